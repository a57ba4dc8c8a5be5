//! Files on this machine, read as sources give their bytes.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    ops::Range,
    path::Path,
};

use bytes::Bytes;

use super::{ByteStream, SourceError};

/// Bytes that are read at a time.
const PIECE: u64 = 256 << 10;

/// The bytes `range` of the file at `path`. They are read where they are awaited, which is quick enough on the thread that
/// fetches.
///
/// # Errors
/// `Disk` when there is no such file, also while it is read.
pub fn read(path: &Path, range: Range<u64>) -> Result<ByteStream, SourceError> {
    let failed = |error: std::io::Error| SourceError::disk(path, &error);
    let mut file = File::open(path).map_err(failed)?;
    file.seek(SeekFrom::Start(range.start)).map_err(failed)?;
    let path = path.to_path_buf();
    let mut left = range.end.saturating_sub(range.start);
    let pieces = std::iter::from_fn(move || {
        let mut piece = Vec::new();
        match file.by_ref().take(left.min(PIECE)).read_to_end(&mut piece) {
            // Whoever reads counts.
            Ok(0) => None,
            Ok(read) => {
                left -= read as u64;
                Some(Ok(Bytes::from(piece)))
            }
            Err(error) => {
                left = 0;
                Some(Err(SourceError::disk(&path, &error)))
            }
        }
    });
    Ok(Box::pin(tokio_stream::iter(pieces)))
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_range_comes_in_pieces() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let content: Vec<u8> = (0..PIECE * 2 + 10).map(|number| (number % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let all = |range: Range<u64>| {
            let stream = read(&path, range).unwrap();
            async { stream.map(Result::unwrap).collect::<Vec<Bytes>>().await }
        };
        assert_eq!(all(5..PIECE * 2).await.concat(), content[5..(PIECE * 2) as usize]);
        assert_eq!(all(5..PIECE * 9).await.len(), 3);
        assert!(matches!(read(&folder.path().join("none"), 0..1), Err(SourceError::Disk { .. })));
    }
}
