"""Programs that show Petiole at work. Run from the folder that holds ``examples``."""
