//! Work on rows of elements, divided over the threads of the session.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, bail};
use rayon::prelude::*;

/// Elements that are worth a thread's while.
pub(super) const GRAIN: usize = 16 << 10;

struct InPlace<F>(F);

/// Calls `work` for each row of `x`, whose elements it may overwrite, and the row's number.
pub(super) fn for_rows(x: &Tensor, work: impl Fn(usize, &mut [f32]) + Send + Sync) -> Result<()> {
    x.inplace_op1(&InPlace(work))
}

/// Calls `work` for each chunk of `size` elements and its number, in the pool of the session.
pub(super) fn for_chunks(elements: &mut [f32], size: usize, work: impl Fn(usize, &mut [f32]) + Send + Sync) {
    let size = size.max(1);
    if elements.len() < 2 * GRAIN || rayon::current_num_threads() == 1 {
        elements.chunks_mut(size).enumerate().for_each(|(index, chunk)| work(index, chunk));
    } else {
        let least = GRAIN.div_ceil(size);
        elements.par_chunks_mut(size).with_min_len(least).enumerate().for_each(|(index, chunk)| work(index, chunk));
    }
}

impl<F: Fn(usize, &mut [f32]) + Send + Sync> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        "rows"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match (storage, layout.contiguous_offsets()) {
            (CpuStorage::F32(values), Some((start, end))) => {
                let size = layout.dims().last().copied().unwrap_or(1);
                for_chunks(&mut values[start..end], size, &self.0);
                Ok(())
            }
            (CpuStorage::F32(_), None) => bail!("elements do not lie one behind the other"),
            _ => bail!("activations on a CPU are of 32 bits"),
        }
    }
}
