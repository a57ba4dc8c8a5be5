//! Tar archives, read member by member, with every length bounded before it is believed.

use std::io::{self, ErrorKind, Read};

const BLOCK: usize = 512;
/// Bytes of a long name, or of what else is said about a member; no file system takes longer names.
const MAX_EXTENSION: u64 = 64 << 10;

/// An archive's members, one after the other.
pub struct Archive<R> {
    reader: R,
    /// Bytes of the present member that have not been read.
    left: u64,
    /// Bytes between its end and the next block.
    padding: u64,
}

/// A member, before its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// As the archive has it: nobody has checked it yet.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// In bytes; 0 of what is no file.
    pub size: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    Folder,
    /// What it is instead.
    Other(&'static str),
}

impl<R: Read> Archive<R> {
    pub fn new(reader: R) -> Self {
        Self { reader, left: 0, padding: 0 }
    }

    /// The next member; what was not read of the one before is passed over.
    ///
    /// # Errors
    /// The reader's own, and `InvalidData` when the archive is none or says what cannot be followed.
    pub fn next(&mut self) -> io::Result<Option<Member>> {
        let (mut path, mut size) = (None, None);
        let mut sparse = false;
        loop {
            self.pass()?;
            let Some(header) = self.block()? else { return Ok(None) };
            let kind = header[156];
            let announced = number(&header[124..136])?;
            match kind {
                b'L' => path = Some(until_nul(&self.extension(announced)?).to_vec()),
                b'x' => {
                    for (key, value) in records(&self.extension(announced)?)? {
                        match key.as_slice() {
                            b"path" => path = Some(value),
                            b"size" => size = Some(decimal(&value)?),
                            key => sparse |= key.starts_with(b"GNU.sparse."),
                        }
                    }
                }
                // Where a link leads, which is not followed; and what would hold for all members, such as comments.
                b'K' | b'g' => drop(self.extension(announced)?),
                _ => return self.member(&header, path, size.unwrap_or(announced), sparse).map(Some),
            }
        }
    }

    fn member(&mut self, header: &[u8; BLOCK], path: Option<Vec<u8>>, size: u64, sparse: bool) -> io::Result<Member> {
        let path = path.unwrap_or_else(|| short_path(header));
        let kind = match header[156] {
            _ if sparse => Kind::Other("a sparse file"),
            // Very old archives know folders by their names alone.
            b'0' | 0 | b'7' if path.ends_with(b"/") => Kind::Folder,
            b'0' | 0 | b'7' => Kind::File,
            b'5' => Kind::Folder,
            b'1' => Kind::Other("a hard link"),
            b'2' => Kind::Other("a symbolic link"),
            b'3' | b'4' => Kind::Other("a device"),
            b'6' => Kind::Other("a pipe"),
            b'S' => Kind::Other("a sparse file"),
            _ => Kind::Other("of an unknown kind"),
        };
        // Links have no content, whatever their size says.
        let size = if matches!(header[156], b'1'..=b'6') { 0 } else { size };
        self.begin(size)?;
        Ok(Member { path, kind, size: if kind == Kind::File { size } else { 0 } })
    }

    /// The next block that is a header; `None` at the end.
    fn block(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let mut read = 0;
        while read < BLOCK {
            match self.reader.read(&mut block[read..])? {
                // Some programs leave out the empty blocks at the end.
                0 if read == 0 => return Ok(None),
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                more => read += more,
            }
        }
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sum = |range: &[u8]| range.iter().map(|byte| u64::from(*byte)).sum::<u64>();
        let spaces = 8 * u64::from(b' ');
        if number(&block[148..156])? != sum(&block[..148]) + spaces + sum(&block[156..]) {
            return Err(malformed("it is no tar archive, or a broken one: a header's sum is wrong"));
        }
        Ok(Some(block))
    }

    fn begin(&mut self, size: u64) -> io::Result<()> {
        self.left = size;
        let blocks = size.checked_next_multiple_of(BLOCK as u64).ok_or_else(|| malformed("a member is too large"))?;
        self.padding = blocks - size;
        Ok(())
    }

    fn extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_EXTENSION {
            return Err(malformed("a member's name is too long"));
        }
        self.begin(size)?;
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Goes to the end of the present member.
    fn pass(&mut self) -> io::Result<()> {
        let rest = self.left.saturating_add(self.padding);
        (self.left, self.padding) = (0, 0);
        match io::copy(&mut self.reader.by_ref().take(rest), &mut io::sink())? {
            passed if passed == rest => Ok(()),
            _ => Err(ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// The content of the present member.
impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 || buffer.is_empty() {
            return Ok(0);
        }
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        match self.reader.read(&mut buffer[..most])? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            read => {
                self.left -= read as u64;
                Ok(read)
            }
        }
    }
}

fn short_path(header: &[u8; BLOCK]) -> Vec<u8> {
    let name = until_nul(&header[..100]);
    // GNU's own form has times where POSIX has the beginning of a long path.
    let prefix = if &header[257..263] == b"ustar\0" { until_nul(&header[345..500]) } else { &[] };
    if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
}

/// The records `length key=value LF` of an extended header.
fn records(mut bytes: &[u8]) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let wrong = || malformed("an extended header cannot be read");
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let space = bytes.iter().position(|byte| *byte == b' ').ok_or_else(wrong)?;
        let length = usize::try_from(decimal(&bytes[..space])?).map_err(|_| wrong())?;
        let record = bytes.get(space + 1..length).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(wrong)?;
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
        records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        bytes = &bytes[length..];
    }
    Ok(records)
}

/// A number of a header: in octal, or in binary when its first bit says so.
fn number(field: &[u8]) -> io::Result<u64> {
    let wrong = || malformed("a number in a header cannot be read");
    if let Some((first, rest)) = field.split_first().filter(|(first, _)| **first >= 0x80) {
        // What is negative or longer than 64 bits has other bits before the last eight bytes.
        let (high, low) = rest.split_at(rest.len().saturating_sub(8));
        if *first != 0x80 || high.iter().any(|byte| *byte != 0) {
            return Err(wrong());
        }
        return Ok(low.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)));
    }
    let text = std::str::from_utf8(until_nul(field)).map_err(|_| wrong())?.trim();
    if text.is_empty() { Ok(0) } else { u64::from_str_radix(text, 8).map_err(|_| wrong()) }
}

fn decimal(text: &[u8]) -> io::Result<u64> {
    let number = std::str::from_utf8(text).ok().filter(|text| text.bytes().all(|digit| digit.is_ascii_digit()));
    number.and_then(|text| text.parse().ok()).ok_or_else(|| malformed("a number in an extended header cannot be read"))
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn malformed(reason: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, reason)
}

#[cfg(test)]
pub mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A member as POSIX has it.
    pub fn member(path: &str, kind: u8, content: &[u8]) -> Vec<u8> {
        let mut header = [0; BLOCK];
        header[..path.len()].copy_from_slice(path.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
        header[148..156].copy_from_slice(b"        ");
        header[156] = kind;
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        let padding = content.len().next_multiple_of(BLOCK) - content.len();
        [&header[..], content, &vec![0; padding]].concat()
    }

    pub fn file(path: &str, content: &[u8]) -> Vec<u8> {
        member(path, b'0', content)
    }

    fn list(bytes: &[u8]) -> io::Result<Vec<(String, Kind, String)>> {
        let mut archive = Archive::new(bytes);
        let mut members = Vec::new();
        while let Some(member) = archive.next()? {
            let mut content = String::new();
            archive.read_to_string(&mut content)?;
            members.push((String::from_utf8(member.path).unwrap(), member.kind, content));
        }
        Ok(members)
    }

    #[test]
    fn members_come_with_their_contents() {
        let long = "long/".repeat(40) + "end";
        let pax = |record: &str| member("x", b'x', format!("{} {record}\n", record.len() + 4).as_bytes());
        let bytes = [
            member("models/", b'5', b""),
            file("models/a", b"alpha"),
            member("models/b", b'2', b""),
            member("././@LongLink", b'L', format!("{long}\0").as_bytes()),
            file("long", b"beta"),
            pax("path=ü"),
            file("u", b"gamma"),
            member("global", b'g', b"9 a=b\n\n\n\n"),
            file("last", &[b'x'; 1000]),
            vec![0; 1024],
            b"what follows the end is nothing".to_vec(),
        ];
        let of = |path: &str, kind, content: &str| (path.to_owned(), kind, content.to_owned());
        let expected = [
            of("models/", Kind::Folder, ""),
            of("models/a", Kind::File, "alpha"),
            of("models/b", Kind::Other("a symbolic link"), ""),
            of(&long, Kind::File, "beta"),
            of("ü", Kind::File, "gamma"),
            of("last", Kind::File, &"x".repeat(1000)),
        ];
        assert_eq!(list(&bytes.concat()).unwrap(), expected);
        // Contents that nobody reads are passed over.
        let bytes = bytes.concat();
        let mut archive = Archive::new(bytes.as_slice());
        let mut count = 0;
        while archive.next().unwrap().is_some() {
            count += 1;
        }
        assert_eq!(count, 6);
    }

    #[test]
    fn what_is_no_archive_is_said_to_be_none() {
        assert_eq!(list(b"").unwrap(), []);
        assert!(list(&[b'x'; 600]).unwrap_err().to_string().contains("cannot be read"));
        assert_eq!(list(b"short").unwrap_err().kind(), ErrorKind::UnexpectedEof);
        let mut bytes = file("a", b"alpha");
        assert_eq!(list(&bytes[..514]).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        bytes[0] = b'b';
        assert!(list(&bytes).unwrap_err().to_string().contains("sum is wrong"));
    }

    #[test]
    fn lengths_are_bounded_before_they_are_believed() {
        let mut huge = member("x", b'L', b"");
        huge[124..135].copy_from_slice(b"77777777777");
        let sum: u64 =
            huge.iter().enumerate().filter(|(at, _)| !(148..156).contains(at)).map(|(_, b)| u64::from(*b)).sum();
        huge[148..155].copy_from_slice(format!("{:06o}\0", sum + 256).as_bytes());
        assert!(list(&huge).unwrap_err().to_string().contains("too long"));
        assert_eq!(number(b"\x80\0\0\0\0\0\0\0\0\x01\0\0").unwrap(), 65536);
        assert!(number(b"\x80\0\0\x01\0\0\0\0\0\x01\0\0").is_err());
        assert!(number(&[0xff; 12]).is_err());
        assert!(records(b"999 path=a\n").is_err());
        assert!(records(b"1 path=a\n").is_err());
        assert!(records(b"0 ").is_err());
        let sparse = b"22 GNU.sparse.major=1\n";
        let bytes = [member("x", b'x', sparse), file("a", b"")].concat();
        assert_eq!(list(&bytes).unwrap()[0].1, Kind::Other("a sparse file"));
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_read(
            bytes in prop::collection::vec(any::<u8>(), 0..2000),
            kind in any::<u8>(),
            size in prop::collection::vec(prop_oneof![any::<u8>(), b'0'..b'8'], 12),
        ) {
            let _ = list_any(&bytes);
            // With a sum that is right, so that the rest of the header counts.
            let mut header = member("models/a", kind, b"");
            header[124..136].copy_from_slice(&size);
            header[148..156].fill(b' ');
            let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            let _ = list_any(&[header, bytes].concat());
        }
    }

    fn list_any(bytes: &[u8]) -> io::Result<()> {
        let mut archive = Archive::new(bytes);
        while archive.next()?.is_some() {
            archive.read_to_end(&mut Vec::new())?;
        }
        Ok(())
    }
}
