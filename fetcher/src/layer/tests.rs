//! Layers over a source that can be held back and broken.

mod along;
mod copies;
mod faults;
mod foresight;
mod late;
mod memory;
mod order;
mod readers;
mod recorded;
mod support;
