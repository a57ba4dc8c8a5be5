//! `Rotation`: positions as angles by which queries and keys are turned.

use candle_core::{Device, Result, Tensor};

/// Cosines and sines for each position, of half a head's size.
#[derive(Debug)]
pub struct Rotation {
    pub cosines: Tensor,
    pub sines: Tensor,
}

impl Rotation {
    /// # Errors
    /// What candle says.
    pub fn new(positions: usize, head_size: usize, theta: f64, device: &Device) -> Result<Self> {
        let frequencies: Vec<f32> =
            (0..head_size / 2).map(|index| (1.0 / theta.powf((2 * index) as f64 / head_size as f64)) as f32).collect();
        // In 32 bits, as the models were trained; halves could not even count the positions.
        let angles = (0..positions).flat_map(|position| frequencies.iter().map(move |f| position as f32 * f));
        let angles: Vec<f32> = angles.collect();
        let table = |of: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|&angle| of(angle)).collect();
            Tensor::from_vec(values, (positions, head_size / 2), device)
        };
        Ok(Self { cosines: table(f32::cos)?, sines: table(f32::sin)? })
    }
}

/// Turns the pairs of one element of the first half and one of the second.
pub(super) fn turn(line: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let (first, second) = line.split_at_mut(cosines.len());
    for ((a, b), (cosine, sine)) in first.iter_mut().zip(second).zip(cosines.iter().zip(sines)) {
        (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
    }
}
