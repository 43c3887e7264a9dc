"""The gRPC API: the same requests as over HTTP, with prompts in chunks and answers that outlive a connection."""
