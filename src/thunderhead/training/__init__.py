"""The LightningModule, the plan of a run, its callbacks and its record."""
