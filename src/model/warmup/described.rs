//! Sample requests that a configuration describes: shapes, and zeros, random values or a file to fill them.

use std::{collections::BTreeMap, fs, path::Path};

use bytes::Bytes;
use rand::{SeedableRng, rngs::StdRng};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::made_up_data;
use crate::{
    backend::Signature,
    error::Error,
    tensor::{DType, Data, Shape, Tensor, elements},
};

/// More bytes in a described tensor than any model takes are a typing error.
const MAX_BYTES: usize = 1 << 30;

/// A model that is not warm after so many runs never will be.
const MAX_COUNT: usize = 10_000;

/// One request to warm up with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DescribedRequest {
    pub name: String,
    /// Rows, each as `inputs` describes one; 1 or absent when the model has no batch dimension.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<usize>,
    /// How often it is run.
    #[serde(default = "once", skip_serializing_if = "is_once")]
    pub count: usize,
    pub inputs: BTreeMap<String, DescribedInput>,
}

/// The content of one input, or of one row of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DescribedInput {
    pub datatype: DType,
    /// The size of each dimension, without the batch.
    pub dims: Vec<usize>,
    pub data: Filling,
}

/// What fills an input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Filling {
    /// Zeros; empty texts.
    Zero,
    /// Floats from N(0,1), integers 0 and 1, short texts; the same at every load.
    Random,
    /// A file in the folder `warmup` beside the versions: elements as raw bytes, row-major and little-endian; texts
    /// each behind their length as four bytes.
    File(String),
}

fn once() -> usize {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde wants it")]
fn is_once(count: &usize) -> bool {
    *count == 1
}

impl DescribedRequest {
    /// The tensors of the request for a model of this signature; files are looked for in `folder`.
    ///
    /// # Errors
    /// `InvalidArgument` naming the input.
    pub fn build(&self, signature: &Signature, folder: &Path) -> Result<Vec<Tensor>, Error> {
        self.inputs
            .iter()
            .map(|(name, input)| {
                let spec = signature.inputs.iter().find(|spec| *spec.name == **name);
                // One row of a model without rows is all there is.
                let whole = spec.is_some_and(|spec| spec.shape.len() == input.dims.len());
                let batch_size = self.batch_size.filter(|&rows| rows > 1 || !whole);
                let tensor = input.build(name, batch_size, folder);
                tensor.map_err(|error| Error { message: format!("input '{name}': {}", error.message), ..error })
            })
            .collect()
    }

    /// Checks the description for a model whose requests may have `max_batch_size` rows.
    ///
    /// # Errors
    /// What is wrong with the description, naming the key.
    pub fn validate(&self, max_batch_size: Option<usize>) -> Result<(), String> {
        if let (Some(rows), Some(limit)) = (self.batch_size, max_batch_size)
            && rows > limit
        {
            return Err(format!("'{}': batch_size {rows} is more than max_batch_size, {limit}", self.name));
        }
        if self.count > MAX_COUNT {
            return Err(format!("'{}': count {} is more than {MAX_COUNT}", self.name, self.count));
        }
        let zero = [("batch_size", self.batch_size == Some(0)), ("count", self.count == 0)];
        if let Some((key, _)) = zero.into_iter().find(|(_, zero)| *zero) {
            return Err(format!("'{}': {key} must be at least 1", self.name));
        }
        for (input, described) in &self.inputs {
            if described.dims.contains(&0) {
                return Err(format!("'{}': input '{input}': dims must be at least 1 each", self.name));
            }
            if let Filling::File(file) = &described.data
                && Path::new(file).components().any(|part| !matches!(part, std::path::Component::Normal(_)))
            {
                return Err(format!("'{}': input '{input}': file '{file}' must lie in the folder warmup", self.name));
            }
        }
        Ok(())
    }
}

impl DescribedInput {
    fn build(&self, name: &str, batch_size: Option<usize>, folder: &Path) -> Result<Tensor, Error> {
        let rows = batch_size.unwrap_or(1);
        let size = self.datatype.size().unwrap_or(size_of::<Bytes>());
        let bytes = |count: usize| count.checked_mul(rows)?.checked_mul(size);
        let fits = |&count: &usize| bytes(count).is_some_and(|bytes| bytes <= MAX_BYTES);
        let count = elements(&self.dims).filter(fits).ok_or_else(|| {
            let dims = &self.dims;
            Error::invalid(format!("{rows} times {dims:?} of {} are more than {MAX_BYTES} bytes", self.datatype))
        })?;
        let shape: Shape = batch_size.into_iter().chain(self.dims.iter().copied()).collect();
        let data = match &self.data {
            Filling::Zero => match self.datatype.size() {
                Some(size) => Data::Plain(vec![0; count * rows * size].into()),
                None => Data::Strings(vec![Bytes::new(); count * rows]),
            },
            Filling::Random => made_up_data(self.datatype, count * rows, 0, &mut StdRng::seed_from_u64(42)),
            Filling::File(file) => {
                let content = self.read(&folder.join(file), count)?;
                repeated(self.datatype, &content, count, rows)?
            }
        };
        Tensor::new(name.into(), self.datatype, shape, data)
    }

    /// The file with the `count` elements of one row.
    fn read(&self, path: &Path, count: usize) -> Result<Vec<u8>, Error> {
        let wrong = |reason: String| Error::invalid(format!("{}: {reason}", path.display()));
        let metadata = fs::metadata(path).map_err(|error| wrong(error.to_string()))?;
        let expected = self.datatype.size().map(|size| (count * size) as u64);
        match expected.filter(|&expected| expected != metadata.len()) {
            Some(expected) => {
                let (datatype, dims, length) = (self.datatype, &self.dims, metadata.len());
                Err(wrong(format!("{datatype} {dims:?} takes {expected} bytes, and the file has {length}")))
            }
            None if !metadata.is_file() || metadata.len() > MAX_BYTES as u64 => {
                Err(wrong(format!("not a file of at most {MAX_BYTES} bytes")))
            }
            None => fs::read(path).map_err(|error| wrong(error.to_string())),
        }
    }
}

/// The content of a file, which holds the `count` elements of one row, once for each row.
fn repeated(datatype: DType, bytes: &[u8], count: usize, rows: usize) -> Result<Data, Error> {
    if datatype.size().is_some() {
        return Ok(Data::Plain(bytes.repeat(rows).into()));
    }
    let mut texts = Vec::new();
    let mut rest = bytes;
    while texts.len() <= count
        && let Some((length, after)) = rest.split_first_chunk::<4>()
        && let Some((text, after)) = after.split_at_checked(u32::from_le_bytes(*length) as usize)
    {
        texts.push(Bytes::copy_from_slice(text));
        rest = after;
    }
    if texts.len() != count || !rest.is_empty() {
        let message = format!("the file must hold {count} texts, each behind its length as four bytes, and no more");
        return Err(Error::invalid(message));
    }
    Ok(Data::Strings(texts.into_iter().cycle().take(count * rows).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::TensorSpec;

    fn build(dims: &[usize], datatype: DType, data: Filling, file: &[u8]) -> Result<Tensor, Error> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("raw"), file).unwrap();
        let inputs = BTreeMap::from([("x".to_owned(), DescribedInput { datatype, dims: dims.to_vec(), data })]);
        let request = DescribedRequest { name: "r".into(), batch_size: Some(2), count: 1, inputs };
        request.build(&Signature::default(), folder.path()).map(|mut tensors| tensors.remove(0))
    }

    #[test]
    fn every_filling_fills_every_row() {
        let zeros = build(&[3], DType::Int16, Filling::Zero, b"").unwrap();
        assert_eq!((&zeros.shape[..], zeros.byte_len()), (&[2, 3][..], 12));
        let random = build(&[2], DType::Fp32, Filling::Random, b"").unwrap();
        assert!(matches!(&random.data, Data::Plain(bytes) if bytes.len() == 16 && bytes.iter().any(|&byte| byte > 0)));
        let file = build(&[2], DType::Uint8, Filling::File("raw".into()), &[7, 8]).unwrap();
        assert_eq!(file.data, Data::Plain(Bytes::from_static(&[7, 8, 7, 8])));
        let texts = build(&[1], DType::Bytes, Filling::File("raw".into()), b"\x02\0\0\0hi").unwrap();
        assert_eq!(texts.data, Data::Strings(vec![Bytes::from_static(b"hi"); 2]));
    }

    #[test]
    fn one_row_of_a_model_without_rows_is_all_there_is() {
        let input = DescribedInput { datatype: DType::Uint8, dims: vec![2], data: Filling::Zero };
        let request = |rows| DescribedRequest {
            name: "r".into(),
            batch_size: Some(rows),
            count: 1,
            inputs: BTreeMap::from([("x".to_owned(), input.clone())]),
        };
        let shape = |declared: &[i64], rows| {
            let spec = TensorSpec { name: "x".into(), dtype: DType::Uint8, shape: declared.to_vec() };
            let signature = Signature { inputs: vec![spec], ..Signature::default() };
            request(rows).build(&signature, Path::new("")).unwrap()[0].shape.to_vec()
        };
        assert_eq!(shape(&[2], 1), [2]);
        assert_eq!(shape(&[-1, 2], 1), [1, 2]);
        assert_eq!(shape(&[-1, 2], 3), [3, 2]);
        assert_eq!(shape(&[2], 3), [3, 2], "the model will say that it has no rows");
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let message = |dims: &[usize], data, file: &[u8]| build(dims, DType::Fp32, data, file).unwrap_err().message;
        assert!(message(&[2], Filling::File("raw".into()), &[1, 2]).contains("'x'"));
        assert!(message(&[2], Filling::File("none".into()), &[]).contains("none"));
        assert!(message(&[2], Filling::File("raw".into()), &[0; 64]).contains("takes 8 bytes, and the file has 64"));
        assert!(message(&[1 << 28], Filling::Zero, &[]).contains("more than"));
        for file in [&b"\0\0\0\0\0\0\0\0"[..], b"\x02\0\0\0h", b"\0\0\0\0x", b""] {
            let texts = build(&[], DType::Bytes, Filling::File("raw".into()), file).unwrap_err().message;
            assert!(texts.contains("must hold 1 texts"), "{texts}");
        }
        assert!(message(&[usize::MAX], Filling::Zero, &[]).contains("more than"));
        let inputs = BTreeMap::from([(
            "x".to_owned(),
            DescribedInput { datatype: DType::Fp32, dims: vec![1], data: Filling::File("../secret".into()) },
        )]);
        let request = DescribedRequest { name: "r".into(), batch_size: None, count: 1, inputs };
        assert!(request.validate(None).unwrap_err().contains("../secret"));
        let large = DescribedRequest { batch_size: Some(9), ..request.clone() };
        assert!(large.validate(Some(8)).unwrap_err().contains("more than max_batch_size, 8"));
        for count in [0, MAX_COUNT + 1] {
            let wrong = DescribedRequest { count, ..request.clone() };
            assert!(wrong.validate(None).unwrap_err().contains("count"), "{count}");
        }
    }
}
