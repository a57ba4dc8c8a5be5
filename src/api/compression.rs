//! Compressed REST bodies: gzip and zlib, in and out.
//!
//! A few kilobytes can unfold into gigabytes, so decompression stops at the limit that holds for plain bodies, and
//! never holds more than that in memory. (gRPC compresses each message by itself, in its library.)

use std::io::{self, Read, Write};

use bytes::Bytes;
use flate2::{Compression, Decompress, FlushDecompress, Status, bufread::GzDecoder, write};

use crate::error::{Code, Error};

/// Bytes read at once; the first allocation too.
const CHUNK: usize = 64 * 1024;

/// How a body is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Identity,
    Gzip,
    /// A zlib stream, which is what HTTP calls deflate.
    Deflate,
}

impl Encoding {
    /// The best first.
    const ALL: [Encoding; 3] = [Encoding::Gzip, Encoding::Deflate, Encoding::Identity];

    /// The name in `Content-Encoding`.
    pub fn name(self) -> &'static str {
        match self {
            Encoding::Identity => "identity",
            Encoding::Gzip => "gzip",
            Encoding::Deflate => "deflate",
        }
    }

    /// `None` for anything but one known name: lists of encodings are not undone.
    pub fn parse(name: &str) -> Option<Self> {
        let name = name.trim();
        // The old alias is to be treated as equal (RFC 9110, 8.4.1.3).
        let name = if name.eq_ignore_ascii_case("x-gzip") { "gzip" } else { name };
        Encoding::ALL.into_iter().find(|encoding| name.eq_ignore_ascii_case(encoding.name()))
    }
}

/// Unpacks a body of at most `limit` bytes.
///
/// # Errors
/// `TooLarge` for more than `limit` bytes, `InvalidArgument` for a body that is not packed as it should be.
pub fn decode_body(encoding: Encoding, body: Bytes, limit: usize) -> Result<Bytes, Error> {
    let mut rest = &body[..];
    let mut out = Vec::new();
    let unpacked = match encoding {
        Encoding::Identity if body.len() <= limit => return Ok(body),
        Encoding::Identity => Ok(false),
        Encoding::Gzip => unpack_gzip(&mut rest, &mut out, limit),
        Encoding::Deflate => {
            let mut inflate = Inflate { state: Decompress::new(true), input: &mut rest, is_done: false };
            read_limited(&mut inflate, &mut out, limit)
        }
    };
    let name = encoding.name();
    match unpacked {
        Ok(true) if rest.is_empty() => Ok(out.into()),
        Ok(true) => Err(Error::invalid(format!("the {name} body has {} bytes after its end", rest.len()))),
        Ok(false) => Err(Error::new(
            Code::TooLarge,
            format!("the body is larger than {limit} bytes, the limit for requests after decompression"),
        )),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(Error::invalid(format!("the {name} body ends too soon")))
        }
        Err(error) => Err(Error::invalid(format!("the body is not valid {name}: {error}"))),
    }
}

/// Packs the pieces into one body.
///
/// # Errors
/// `Internal` should packing ever fail.
pub fn encode_body(encoding: Encoding, pieces: &[Bytes]) -> Result<Bytes, Error> {
    fn fill<W: Write>(mut writer: W, pieces: &[Bytes]) -> io::Result<W> {
        pieces.iter().try_for_each(|piece| writer.write_all(piece))?;
        Ok(writer)
    }
    // Tensors pack badly at any level, and time is what a caller of a model waits for.
    let level = Compression::fast();
    let packed = match encoding {
        Encoding::Identity => match pieces {
            [piece] => return Ok(piece.clone()),
            pieces => Ok(pieces.concat()),
        },
        Encoding::Gzip => fill(write::GzEncoder::new(Vec::new(), level), pieces).and_then(write::GzEncoder::finish),
        Encoding::Deflate => {
            fill(write::ZlibEncoder::new(Vec::new(), level), pieces).and_then(write::ZlibEncoder::finish)
        }
    };
    packed
        .map(Bytes::from)
        .map_err(|error| Error::internal(format!("the reply could not be packed as {}: {error}", encoding.name())))
}

/// The encoding that an `Accept-Encoding` header likes best, gzip before deflate before none when it does not care;
/// `None` when it refuses all of them.
pub fn accepted(accept_encoding: &str) -> Option<Encoding> {
    let mut weights = [None; Encoding::ALL.len()];
    let mut any = None;
    for entry in accept_encoding.split(',') {
        let mut parts = entry.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let weight = weight(parts);
        if name == "*" {
            any = Some(weight);
        } else if let Some(encoding) = Encoding::parse(name)
            && let Some(index) = Encoding::ALL.iter().position(|known| *known == encoding)
        {
            weights[index] = Some(weight);
        }
    }
    let mut best = None;
    let mut best_weight = 0;
    for (encoding, named) in Encoding::ALL.into_iter().zip(weights) {
        // Sending a body as it is needs no permission, but is the last choice without one.
        let unnamed = if encoding == Encoding::Identity { 1 } else { 0 };
        let weight = named.or(any).unwrap_or(unnamed);
        if weight > best_weight {
            best_weight = weight;
            best = Some(encoding);
        }
    }
    best
}

/// The `q` among the parameters of an entry, in thousandths; what cannot be read counts as a refusal.
fn weight<'a>(mut parameters: impl Iterator<Item = &'a str>) -> u32 {
    let q = parameters.find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("q").then(|| value.trim())
    });
    match q {
        None => 1000,
        Some(value) => match value.parse::<f32>() {
            Ok(value) if (0.0..=1.0).contains(&value) => (value * 1000.0).round() as u32,
            _ => 0,
        },
    }
}

/// Reads `reader` to its end into `out`, and gives false when that would make more than `limit` bytes.
fn read_limited(reader: &mut impl Read, out: &mut Vec<u8>, limit: usize) -> io::Result<bool> {
    loop {
        let start = out.len();
        if start == limit {
            // Whether this was all shows only when one more byte is asked for.
            return Ok(reader.read(&mut [0])? == 0);
        }
        if start == out.capacity() {
            out.reserve_exact(start.max(CHUNK).min(limit - start));
        }
        out.resize(out.capacity().min(start + CHUNK).min(limit), 0);
        let read = reader.read(&mut out[start..])?;
        out.truncate(start + read);
        if read == 0 {
            return Ok(true);
        }
    }
}

/// A gzip body may be several files in a row, which unpack into one.
fn unpack_gzip(rest: &mut &[u8], out: &mut Vec<u8>, limit: usize) -> io::Result<bool> {
    loop {
        let mut decoder = GzDecoder::new(*rest);
        if !read_limited(&mut decoder, out, limit)? {
            return Ok(false);
        }
        *rest = decoder.into_inner();
        // Anything but the start of another file is left for the caller to complain about.
        if !rest.starts_with(&[0x1f, 0x8b]) {
            return Ok(true);
        }
    }
}

/// Unpacks a zlib stream. The library's own reader takes the end of its input for the end of the stream.
struct Inflate<'a, 'b> {
    state: Decompress,
    input: &'a mut &'b [u8],
    is_done: bool,
}

impl Read for Inflate<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.is_done {
            return Ok(0);
        }
        let (before_in, before_out) = (self.state.total_in(), self.state.total_out());
        let status = self.state.decompress(self.input, buffer, FlushDecompress::None)?;
        let read = (self.state.total_out() - before_out) as usize;
        *self.input = &self.input[(self.state.total_in() - before_in) as usize..];
        self.is_done = status == Status::StreamEnd;
        if read == 0 && !self.is_done {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PACKED: [Encoding; 2] = [Encoding::Gzip, Encoding::Deflate];

    fn pack(encoding: Encoding, data: &[u8]) -> Bytes {
        encode_body(encoding, &[Bytes::copy_from_slice(data)]).unwrap()
    }

    #[test]
    fn the_limit_stops_bombs() {
        for encoding in PACKED {
            let bomb = pack(encoding, &vec![0; 10_000_000]);
            let error = decode_body(encoding, bomb.clone(), 1000).unwrap_err();
            assert_eq!(error.code, Code::TooLarge);
            assert!(error.message.contains("1000 bytes"));
            assert_eq!(decode_body(encoding, bomb.clone(), 10_000_000).unwrap().len(), 10_000_000);
            assert_eq!(decode_body(encoding, bomb, 9_999_999).unwrap_err().code, Code::TooLarge);
            assert!(decode_body(encoding, pack(encoding, b""), 0).unwrap().is_empty());
        }
        assert_eq!(decode_body(Encoding::Identity, Bytes::from_static(b"abc"), 2).unwrap_err().code, Code::TooLarge);
        assert_eq!(decode_body(Encoding::Identity, Bytes::from_static(b"abc"), 3).unwrap(), "abc");
    }

    #[test]
    fn every_damage_is_found() {
        let data: Vec<u8> = (0..2000u32).flat_map(|i| (i * i).to_le_bytes()).collect();
        for encoding in PACKED {
            let whole = pack(encoding, &data);
            let failure = |body: Bytes| decode_body(encoding, body, 1 << 20).unwrap_err();
            for end in 0..whole.len() {
                let error = failure(whole.slice(..end));
                assert_eq!(error.code, Code::InvalidArgument, "{encoding:?} {end}");
                assert_eq!(error.message, format!("the {} body ends too soon", encoding.name()), "{end}");
            }
            let message = failure([&whole[..], b"xyz"].concat().into()).message;
            assert_eq!(message, format!("the {} body has 3 bytes after its end", encoding.name()));
            assert_eq!(failure(Bytes::from_static(b"{\"inputs\":[]}")).code, Code::InvalidArgument);
            let mut flipped = whole.to_vec();
            let middle = flipped.len() / 2;
            flipped[middle] ^= 0x55;
            assert_eq!(failure(flipped.into()).code, Code::InvalidArgument);
        }
    }

    #[test]
    fn gzip_files_in_a_row_are_one_body() {
        let row = [pack(Encoding::Gzip, b"tide"), pack(Encoding::Gzip, b"gate")].concat();
        assert_eq!(decode_body(Encoding::Gzip, row.clone().into(), 8).unwrap(), "tidegate");
        assert_eq!(decode_body(Encoding::Gzip, row.into(), 7).unwrap_err().code, Code::TooLarge);
    }

    #[test]
    fn names_parse() {
        assert_eq!(Encoding::parse("GZIP"), Some(Encoding::Gzip));
        assert_eq!(Encoding::parse(" deflate "), Some(Encoding::Deflate));
        for unknown in ["", "br", "gzip, gzip", "*", "gzip;q=1"] {
            assert_eq!(Encoding::parse(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn the_best_accepted_encoding_wins() {
        use Encoding::{Deflate, Gzip, Identity};
        for (header, expected) in [
            ("", Some(Identity)),
            ("gzip", Some(Gzip)),
            ("deflate", Some(Deflate)),
            ("deflate, gzip", Some(Gzip)),
            ("gzip;q=0.5, deflate;q=0.8", Some(Deflate)),
            ("gzip;q=0", Some(Identity)),
            ("gzip; Q=0.001", Some(Gzip)),
            ("*", Some(Gzip)),
            ("gzip;q=0, *", Some(Deflate)),
            ("identity, gzip;q=0.5", Some(Identity)),
            ("br", Some(Identity)),
            ("*;q=0", None),
            ("identity;q=0", None),
            ("identity;q=0, gzip;q=0.1", Some(Gzip)),
            ("gzip;q=nan, deflate;q=2", Some(Identity)),
            (",;,=,q=1;;", Some(Identity)),
        ] {
            assert_eq!(accepted(header), expected, "{header}");
        }
    }

    proptest! {
        #[test]
        fn bodies_round_trip(pieces: Vec<Vec<u8>>) {
            let whole = pieces.concat();
            let pieces: Vec<Bytes> = pieces.into_iter().map(Bytes::from).collect();
            for encoding in Encoding::ALL {
                let packed = encode_body(encoding, &pieces).unwrap();
                prop_assert_eq!(&decode_body(encoding, packed, whole.len()).unwrap()[..], &whole[..]);
            }
        }

        #[test]
        fn noise_never_panics(noise: Vec<u8>, header: String) {
            for encoding in Encoding::ALL {
                let _ = decode_body(encoding, noise.clone().into(), 100);
            }
            accepted(&header);
        }
    }
}
