"""CrossLMM: dual cross-attention over long videos. Usable without `app/`."""
