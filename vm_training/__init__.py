"""The student's side. So far: `metrics`, what an evaluation reports (normalised entropy, AUC, calibration)."""
