"""Targets for Qualcomm's NPU: aimet, qairt, qnn."""
