"""What the heads are computed with: `tiles` in plain torch, `epilogue` in Triton, `liger` where that package is installed."""
