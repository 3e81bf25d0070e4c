"""The gRPC contract as Python: generated from protos/ by `make protos`, never edited by hand."""
