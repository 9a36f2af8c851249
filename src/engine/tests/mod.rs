//! Tests of the engine as a whole, over real files and over the simulated disk.

mod referee;
