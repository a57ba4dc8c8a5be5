//! Counting and comparing: histograms, how far distributions are apart, and tests that may be looked at at any time.

pub mod divergence;
pub mod histogram;
pub mod labels;
pub mod moments;
pub mod sequential;
