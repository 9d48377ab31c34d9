"""What models are: architectures, units, surgery, and how they are saved."""
