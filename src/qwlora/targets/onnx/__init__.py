"""Targets that ONNX Runtime or OpenVINO reads: onnx, onnx_each, genai, web, openvino."""
