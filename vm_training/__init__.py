"""The student's side. So far: `losses` (distillation) and `metrics` (normalised entropy, AUC, calibration)."""
