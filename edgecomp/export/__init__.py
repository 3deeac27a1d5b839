"""torch -> ONNX: lowering, passes, static and allow-list checks, goldens."""
