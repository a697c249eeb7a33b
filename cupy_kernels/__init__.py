"""Ground floor: border quantization of activations, one operator at a time."""
