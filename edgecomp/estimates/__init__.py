"""What a graph would take on hardware that is not here: computed, never measured. No torch, onnx or TensorRT here."""
