//! Layers with adapters over any backend.
