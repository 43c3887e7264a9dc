"""The HTTP API of ringserve: OpenAI's routes over an AsyncEngine."""
