//! From layer indexes to mountable root file systems.
