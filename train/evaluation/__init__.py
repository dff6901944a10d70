"""What a trained run achieves: scores of images, of diagnoses and of segmentations."""
