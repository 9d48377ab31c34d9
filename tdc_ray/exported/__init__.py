"""Files that ``tdc-ray export`` copies as they are; they need torch, diffusers and safetensors."""
