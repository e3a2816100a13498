"""vl2-nano: synthetic documents, training, evaluation and the shipped small checkpoint."""
