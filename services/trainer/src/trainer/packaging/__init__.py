"""Packaging: a logged model of another format becomes ONNX, in a sandbox, and is shown to answer as before."""
