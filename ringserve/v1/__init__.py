"""Generated from api/proto: messages and services of the gRPC API."""
