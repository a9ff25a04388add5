"""Targets for Qualcomm's NPU: aimet, qairt, qairt_pipeline, qnn."""
