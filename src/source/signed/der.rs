//! What of a certificate `webpki` does not tell: until when it may be trusted, what its key is for, and whose it is.

use std::time::SystemTime;

use humantime_serde::re::humantime;

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const BOOLEAN: u8 = 0x01;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// The context's tags: of the version, of the extensions, and of names that are e-mail addresses, hosts and URIs.
const VERSION: u8 = 0xa0;
const EXTENSIONS: u8 = 0xa3;
const NAMES: [u8; 3] = [0x81, 0x82, 0x86];

const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x0f];
const ALTERNATIVE_NAMES: &[u8] = &[0x55, 0x1d, 0x11];
const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];
const EXTENDED_KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x25];

const DIGITAL_SIGNATURE: u8 = 0x80;
const CERTIFICATE_SIGN: u8 = 0x04;

/// What a certificate says of itself. Nothing of it is true before somebody has verified the certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub is_authority: bool,
    /// Authorities that may stand between it and a signer.
    pub path_length: Option<u64>,
    /// The first byte of the key usage's bits.
    key_usage: Option<u8>,
    pub has_extended_usage: bool,
    /// Its alternative names (e-mail addresses, hosts, URIs), and the common names of its subject.
    pub names: Vec<String>,
}

impl Facts {
    /// `None` when it is no certificate in DER.
    pub fn read(certificate: &[u8]) -> Option<Self> {
        let mut outer = Reader(Reader(certificate).take(SEQUENCE)?);
        let mut inner = Reader(outer.take(SEQUENCE)?);
        let _version = inner.take_if(VERSION);
        let _serial = inner.take(INTEGER)?;
        let _algorithm = inner.take(SEQUENCE)?;
        let _issuer = inner.take(SEQUENCE)?;
        let mut validity = Reader(inner.take(SEQUENCE)?);
        let (not_before, not_after) = (time(validity.next()?)?, time(validity.next()?)?);
        let mut facts = Self {
            not_before,
            not_after,
            is_authority: false,
            path_length: None,
            key_usage: None,
            has_extended_usage: false,
            names: Vec::new(),
        };
        let subject = inner.take(SEQUENCE)?;
        let _key = inner.take(SEQUENCE)?;
        while let Some((tag, content)) = inner.next() {
            if tag == EXTENSIONS {
                facts.read_extensions(content)?;
            }
        }
        let mut relative_names = Reader(subject);
        while let Some(set) = relative_names.take_if(SET) {
            let mut attributes = Reader(set);
            while let Some(attribute) = attributes.take_if(SEQUENCE) {
                let mut attribute = Reader(attribute);
                let (kind, (_, value)) = (attribute.take(OBJECT_IDENTIFIER)?, attribute.next()?);
                if kind == COMMON_NAME {
                    facts.names.extend(text(value));
                }
            }
        }
        Some(facts)
    }

    fn read_extensions(&mut self, content: &[u8]) -> Option<()> {
        let mut extensions = Reader(Reader(content).take(SEQUENCE)?);
        while let Some(extension) = extensions.take_if(SEQUENCE) {
            let mut extension = Reader(extension);
            let kind = extension.take(OBJECT_IDENTIFIER)?;
            let _is_critical = extension.take_if(BOOLEAN);
            let value = extension.take(OCTET_STRING)?;
            match kind {
                KEY_USAGE => {
                    let bits = Reader(value).take(BIT_STRING)?;
                    // The first byte counts the bits that are unused at the end.
                    self.key_usage = Some(bits.get(1).copied().unwrap_or_default());
                }
                EXTENDED_KEY_USAGE => self.has_extended_usage = true,
                BASIC_CONSTRAINTS => {
                    let mut constraints = Reader(Reader(value).take(SEQUENCE)?);
                    self.is_authority = constraints.take_if(BOOLEAN).is_some_and(|value| value == [0xff]);
                    let number = |bytes: &[u8]| bytes.iter().fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte));
                    self.path_length = constraints.take_if(INTEGER).filter(|bytes| bytes.len() <= 7).map(number);
                }
                ALTERNATIVE_NAMES => {
                    let mut names = Reader(Reader(value).take(SEQUENCE)?);
                    while let Some((tag, name)) = names.next() {
                        self.names.extend(text(name).filter(|_| NAMES.contains(&tag)));
                    }
                }
                _ => {}
            }
        }
        Some(())
    }

    /// Whether its key may sign what is no certificate. Without a key usage it is for all that the extended one says.
    pub fn may_sign(&self) -> bool {
        self.key_usage.map_or(self.has_extended_usage, |usage| usage & DIGITAL_SIGNATURE != 0)
    }

    /// Whether its key may sign certificates.
    pub fn may_certify(&self) -> bool {
        self.is_authority && self.key_usage.is_none_or(|usage| usage & CERTIFICATE_SIGN != 0)
    }
}

/// The algorithm of a public key (`SubjectPublicKeyInfo`), as DER has it.
pub fn algorithm_of(key: &[u8]) -> Option<&[u8]> {
    Reader(Reader(key).take(SEQUENCE)?).take(SEQUENCE)
}

/// Reads values of definite length one after the other.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// The next value's tag and content; `None` at the end, and when it is cut short.
    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (&tag, rest) = self.0.split_first()?;
        let (&first, mut rest) = rest.split_first()?;
        let mut length = usize::from(first);
        if first >= 0x80 {
            // More than three bytes of length have no certificate and no key.
            let bytes = rest.get(..usize::from(first & 0x7f)).filter(|bytes| (1..=3).contains(&bytes.len()))?;
            length = bytes.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
            rest = rest.get(bytes.len()..)?;
        }
        let content = rest.get(..length)?;
        self.0 = rest.get(length..)?;
        Some((tag, content))
    }

    /// The next value, when it has this tag.
    fn take_if(&mut self, tag: u8) -> Option<&'a [u8]> {
        (self.0.first() == Some(&tag)).then(|| self.take(tag)).flatten()
    }

    fn take(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.next().filter(|(found, _)| *found == tag).map(|(_, content)| content)
    }
}

fn text(bytes: &[u8]) -> Option<String> {
    std::str::from_utf8(bytes).ok().map(str::to_owned)
}

/// `YYMMDDHHMMSSZ` of the years 1950 to 2049, or the same with four digits of the year.
fn time((tag, content): (u8, &[u8])) -> Option<SystemTime> {
    let digits = std::str::from_utf8(content).ok()?.strip_suffix('Z')?;
    if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let digits = match (tag, digits.len()) {
        (UTC_TIME, 12) if digits < "50" => format!("20{digits}"),
        (UTC_TIME, 12) => format!("19{digits}"),
        (GENERALIZED_TIME, 14) => digits.to_owned(),
        _ => return None,
    };
    let part = |start: usize, end: usize| digits.get(start..end);
    let (date, clock) = ((part(0, 4)?, part(4, 6)?, part(6, 8)?), (part(8, 10)?, part(10, 12)?, part(12, 14)?));
    let text = format!("{}-{}-{}T{}:{}:{}Z", date.0, date.1, date.2, clock.0, clock.1, clock.2);
    // It begins with 1970, as certificates do.
    humantime::parse_rfc3339(&text).ok()
}
