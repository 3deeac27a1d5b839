"""What was measured, and on which machine. No torch, onnx or TensorRT here."""
