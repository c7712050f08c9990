"""minilora: MoRA and SeLoRA in PyTorch, small enough to read, with an export to ONNX. Import the
modules; this file imports nothing.
"""

__version__ = "0.1.0"
