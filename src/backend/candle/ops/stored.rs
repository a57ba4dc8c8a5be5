//! Weights as they are stored, and what is made of them in 32 bits.

use std::borrow::Cow;

use candle_core::{CpuStorage, Device, Layout, Result, Storage, StorageRef, Tensor, bail};
use half::{bf16, f16, slice::HalfFloatSliceExt};

use super::{
    elementwise::add_to,
    rows::{GRAIN, for_chunks},
};

/// The elements of a tensor that lie one behind the other, as they are stored.
enum Stored<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

/// The products of rows, `x`, and a matrix of weights.
pub fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if x.dtype() == weight.dtype() {
        return x.matmul(weight);
    }
    // gemm would multiply 16-bit floats itself, faster where rows are few; but a text's answer would depend on its company.
    let stored = weight.storage_and_layout();
    let stored = Stored::of(&stored)?;
    let mut widened = vec![0.0; weight.elem_count()];
    for_chunks(&mut widened, GRAIN, |index, chunk| stored.copy_to(index * GRAIN, chunk));
    x.matmul(&Tensor::from_vec(widened, weight.shape(), &Device::Cpu)?)
}

/// The sums of the rows of `tables` that `indices` name: one list for each table.
pub fn embed(tables: &[(&Tensor, Vec<u32>)]) -> Result<Tensor> {
    let Some((first, indices)) = tables.first() else { bail!("nothing to embed") };
    let (rows, size) = (indices.len(), first.dim(1)?);
    let stored: Vec<_> = tables.iter().map(|(table, _)| table.storage_and_layout()).collect();
    let stored = stored.iter().map(Stored::of).collect::<Result<Vec<_>>>()?;
    let mut embedded = vec![0.0; rows * size];
    for_chunks(&mut embedded, size, |index, line| {
        let mut part = vec![0.0; size];
        for (table, (_, indices)) in stored.iter().zip(tables) {
            table.copy_to(indices[index] as usize * size, &mut part);
            add_to(line, &part);
        }
    });
    Tensor::from_vec(embedded, (rows, size), &Device::Cpu)
}

/// The elements of a tensor of activations, or of few enough weights to convert them each time.
pub(super) fn numbers<'a>(tensor: &'a (StorageRef<'_>, &Layout)) -> Result<Cow<'a, [f32]>> {
    let stored = Stored::of(tensor)?;
    if let Stored::F32(values) = stored {
        return Ok(Cow::Borrowed(values));
    }
    let mut numbers = vec![0.0; tensor.1.shape().elem_count()];
    stored.copy_to(0, &mut numbers);
    Ok(Cow::Owned(numbers))
}

impl<'a> Stored<'a> {
    fn of((storage, layout): &'a (StorageRef<'_>, &Layout)) -> Result<Self> {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("elements do not lie one behind the other") };
        match &**storage {
            Storage::Cpu(CpuStorage::F32(values)) => Ok(Self::F32(&values[start..end])),
            Storage::Cpu(CpuStorage::F16(values)) => Ok(Self::F16(&values[start..end])),
            Storage::Cpu(CpuStorage::BF16(values)) => Ok(Self::Bf16(&values[start..end])),
            _ => bail!("neither F32 nor F16 nor BF16 on the CPU"),
        }
    }

    /// Fills `part` with what begins at `start`.
    fn copy_to(&self, start: usize, part: &mut [f32]) {
        let range = start..start + part.len();
        match self {
            Self::F32(values) => part.copy_from_slice(&values[range]),
            Self::F16(values) => values[range].convert_to_f32_slice(part),
            Self::Bf16(values) => values[range].convert_to_f32_slice(part),
        }
    }
}
