"""What leaves a run: generated text and exported models."""
