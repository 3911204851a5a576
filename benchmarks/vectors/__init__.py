"""Task vectors beside synchronous rounds: what merging reaches, and how soon, on real images."""
