//! Wanted chunks to merged ranged requests (pure).
