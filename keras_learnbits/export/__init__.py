"""Writers of files: packed, LiteRT, ONNX and QONNX files, and hls4ml projects."""
