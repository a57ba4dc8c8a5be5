//! A REST request of JSON and binary tensors, with the header that says where the one ends and the other begins.
//!
//! An even first byte: two bytes of header length and the body follow, as they are. An odd one: the rest is the dice
//! for a request that is put together so as to get far, whole or with one thing wrong.
#![no_main]

use arbitrary::{Result, Unstructured};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use tidegate::{
    api::codec::decode_json,
    tensor::{DType, Data, Shape, Tensor, elements},
};
use tidegate_fuzz::{allowance, check, within};

fuzz_target!(|data: &[u8]| {
    match data {
        [first, low, high, body @ ..] if first % 2 == 0 => {
            judge(body, usize::from(u16::from_le_bytes([*low, *high])));
        }
        [_, dice @ ..] => {
            let _ = assembled(&mut Unstructured::new(dice));
        }
        [] => {}
    }
});

fn judge(body: &[u8], header_length: usize) -> Option<Vec<Tensor>> {
    let body = Bytes::copy_from_slice(body);
    let call = within(allowance(body.len()), || decode_json(&body, Some(header_length)));
    check(&call);
    let held = body.as_ptr_range();
    let inputs = call.ok()?.inputs;
    for tensor in &inputs {
        if let Data::Plain(bytes) = &tensor.data
            && !bytes.is_empty()
            && held.contains(&bytes.as_ptr())
        {
            let start = bytes.as_ptr().addr() - held.start.addr();
            assert!(start >= header_length, "binary data was taken from the JSON");
        }
    }
    Some(inputs)
}

fn assembled(dice: &mut Unstructured<'_>) -> Result<()> {
    let mut tensors = Vec::new();
    let mut inputs = Vec::new();
    let mut tail = Vec::new();
    for _ in 0..dice.int_in_range(0..=4)? {
        let tensor = tensor(dice)?;
        let bytes = packed(&tensor.data);
        inputs.push(json!({
            "name": &*tensor.name,
            "datatype": tensor.dtype.name(),
            "shape": tensor.shape.to_vec(),
            "parameters": { "binary_data_size": bytes.len() },
        }));
        tail.extend(bytes);
        tensors.push(tensor);
    }
    let is_whole = !spoil(dice, &mut inputs, &mut tail)?;
    let json = serde_json::to_vec(&json!({ "inputs": inputs })).unwrap();
    let skew = if is_whole && dice.ratio(1, 4)? { dice.arbitrary::<i8>()? } else { 0 };
    let read = judge(&[&json[..], &tail].concat(), json.len().saturating_add_signed(skew.into()));
    if is_whole && skew == 0 {
        assert_eq!(read, Some(tensors), "a whole request");
    }
    Ok(())
}

fn tensor(dice: &mut Unstructured<'_>) -> Result<Tensor> {
    let dtype = *dice.choose(&DType::ALL)?;
    let rank = dice.int_in_range(0..=4)?;
    let shape = (0..rank).map(|_| dice.int_in_range(0..=4)).collect::<Result<Shape>>()?;
    let count = elements(&shape).unwrap();
    let data = match dtype.size() {
        Some(size) => {
            let mut bytes = vec![0; count * size];
            dice.fill_buffer(&mut bytes)?;
            if dtype == DType::Bool {
                bytes.iter_mut().for_each(|byte| *byte &= 1);
            }
            Data::Plain(bytes.into())
        }
        None => Data::Strings((0..count).map(|_| dice.arbitrary().map(Vec::into)).collect::<Result<_>>()?),
    };
    let name: String = dice.arbitrary()?;
    Ok(Tensor::new(name.into(), dtype, shape, data).unwrap())
}

/// The layout of the protocol, written out once more so that the server's own is not its only witness.
fn packed(data: &Data) -> Vec<u8> {
    match data {
        Data::Plain(bytes) => bytes.to_vec(),
        Data::Strings(strings) => {
            strings.iter().flat_map(|text| [&(text.len() as u32).to_le_bytes()[..], text].concat()).collect()
        }
    }
}

/// Makes one thing wrong, or strange, or nothing; says whether anything was changed.
fn spoil(dice: &mut Unstructured<'_>, inputs: &mut [Value], tail: &mut Vec<u8>) -> Result<bool> {
    let kind = dice.int_in_range(0..=15)?;
    let Some(last) = inputs.len().checked_sub(1) else { return Ok(false) };
    let input = &mut inputs[dice.int_in_range(0..=last)?];
    match kind {
        0 => input["parameters"]["binary_data_size"] = dice.arbitrary::<u64>()?.into(),
        1 => input["parameters"]["binary_data_size"] = dice.arbitrary::<i64>()?.into(),
        2 => input["shape"] = vec![dice.arbitrary::<i64>()?; dice.int_in_range(1..=70)?].into(),
        3 => input["datatype"] = DType::ALL[dice.choose_index(DType::ALL.len())?].name().into(),
        4 => input["data"] = vec![dice.arbitrary::<u8>()?].into(),
        5 => input["parameters"] = Value::Null,
        6 => tail.truncate(dice.int_in_range(0..=tail.len())?),
        7 => tail.extend(dice.arbitrary::<Vec<u8>>()?),
        8 if !tail.is_empty() => {
            let at = dice.choose_index(tail.len())?;
            tail[at] = dice.arbitrary()?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}
