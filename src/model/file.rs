//! Small files that belong to a model, read whole.

use std::{
    fs::{self, File},
    io::Read,
    path::Path,
};

/// The bytes of the file at `path`, of which there may be `most`.
///
/// # Errors
/// The reason, which does not name the file.
pub(super) fn read(path: &Path, most: u64) -> Result<Vec<u8>, String> {
    // Opening a pipe would wait for whoever writes into it.
    if !fs::metadata(path).map_err(|error| error.to_string())?.is_file() {
        return Err("not a file".to_owned());
    }
    let file = File::open(path).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > most {
        return Err(format!("larger than {most} bytes"));
    }
    Ok(bytes)
}
