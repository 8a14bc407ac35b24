"""The control-plane API, /api/v1: what the command, the SDK and the web page need, translated to the services' gRPC."""
