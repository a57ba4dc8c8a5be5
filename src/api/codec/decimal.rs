//! `Decimal`: a number of a JSON text, its grammar checked and its digits gathered in the same pass.
//!
//! A number of few digits is one multiplication or division away from its float, with no error but that of rounding
//! once (W. D. Clinger, "How to read floating point numbers accurately", 1990). The standard library knows this too,
//! after looking at the digits again; here they have been looked at.

use super::elements::Element;

/// More digits than these need not fit.
const MAX_DIGITS: usize = 18;

/// The powers of ten that a double holds exactly.
const POWERS: [f64; 23] = [
    1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20,
    1e21, 1e22,
];

/// A number as it is written.
pub(super) struct Decimal<'a> {
    bytes: &'a [u8],
    negative: bool,
    /// All digits in a row, when there are not too many.
    digits: Option<u64>,
    /// How many of them stand behind the point.
    places: usize,
    /// Whether there is neither a point nor an exponent.
    whole: bool,
    /// Whether there is an exponent.
    scaled: bool,
}

impl<'a> Decimal<'a> {
    /// Reads the number that `bytes` begins with; `None` when it begins with none.
    pub(super) fn read(bytes: &'a [u8]) -> Option<Self> {
        let negative = bytes.first() == Some(&b'-');
        let start = usize::from(negative);
        let (mut at, mut digits) = (start, 0u64);
        let mut run = |at: &mut usize| {
            let begin = *at;
            while let Some(digit) = bytes.get(*at).map(|byte| byte.wrapping_sub(b'0')).filter(|&digit| digit < 10) {
                digits = digits.wrapping_mul(10).wrapping_add(digit.into());
                *at += 1;
            }
            *at - begin
        };
        let mut count = run(&mut at);
        if count == 0 || (count > 1 && bytes[start] == b'0') {
            return None;
        }
        let mut places = 0;
        if bytes.get(at) == Some(&b'.') {
            at += 1;
            places = run(&mut at);
            count += places;
            if places == 0 {
                return None;
            }
        }
        let digits = (count <= MAX_DIGITS).then_some(digits);
        let scaled = matches!(bytes.get(at), Some(b'e' | b'E'));
        if scaled {
            at += 1 + usize::from(matches!(bytes.get(at + 1), Some(b'+' | b'-')));
            let exponent = bytes[at.min(bytes.len())..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            if exponent == 0 {
                return None;
            }
            at += exponent;
        }
        Some(Self { bytes: &bytes[..at], negative, digits, places, whole: places == 0 && !scaled, scaled })
    }

    /// Bytes of its text.
    pub(super) fn length(&self) -> usize {
        self.bytes.len()
    }

    /// The number as the library reads it.
    fn parse<E: Element>(&self) -> Option<E> {
        E::parse(std::str::from_utf8(self.bytes).ok()?)
    }

    /// The number, when it is written as an integer; never minus nothing, which is not one everywhere.
    pub(super) fn integer(&self) -> Option<i64> {
        let digits = i64::try_from(self.digits.filter(|_| self.whole)?).ok()?;
        match self.negative {
            true => (digits != 0).then_some(-digits),
            false => Some(digits),
        }
    }

    /// The nearest double, where one operation gives it.
    fn double(&self) -> Option<f64> {
        const EXACT: u64 = 1 << 53;
        let digits = self.digits.filter(|&digits| digits <= EXACT && !self.scaled)?;
        let value = digits as f64 / POWERS.get(self.places)?;
        Some(if self.negative { -value } else { value })
    }
}

/// An element that a decimal may say.
pub(super) trait Number: Element {
    /// `None` for what is out of range, or no such number.
    fn of(decimal: &Decimal<'_>) -> Option<Self>;
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Number for $type {
            fn of(decimal: &Decimal<'_>) -> Option<Self> {
                match decimal.integer() {
                    Some(value) => value.try_into().ok(),
                    None => decimal.parse(),
                }
            }
        }
    )*};
}

integers!(u8, u16, u32, u64, i8, i16, i32, i64);

impl Number for f64 {
    fn of(decimal: &Decimal<'_>) -> Option<Self> {
        decimal.double().or_else(|| decimal.parse())
    }
}

impl Number for f32 {
    fn of(decimal: &Decimal<'_>) -> Option<Self> {
        /// The bits of a double that a float has no room for.
        const BEYOND: u64 = (1 << 29) - 1;
        const HALF: u64 = 1 << 28;
        let is_safe = |value: &f64| {
            // A double halfway between two floats may have been rounded to there, and rounding twice may go wrong;
            // smaller floats have fewer bits.
            let is_halfway = value.to_bits() & BEYOND == HALF;
            !is_halfway && (*value == 0.0 || (1e-30..1e30).contains(&value.abs()))
        };
        decimal.double().filter(is_safe).map(|value| value as f32).or_else(|| decimal.parse())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_numbers_of_json_are_read() {
        for (text, length) in [
            ("0", 1),
            ("-0", 2),
            ("10.50,", 5),
            ("1e5]", 3),
            ("2.5E-3 ", 6),
            ("01", 0),
            ("1.", 0),
            (".5", 0),
            ("+1", 0),
        ] {
            assert_eq!(Decimal::read(text.as_bytes()).map_or(0, |number| number.length()), length, "{text}");
        }
        for text in ["", "-", "-a", "1e", "1e+", "1.e5", "inf", "NaN", "00", "-01"] {
            assert!(Decimal::read(text.as_bytes()).is_none(), "{text}");
        }
    }

    fn same(text: &str) {
        let number = Decimal::read(text.as_bytes()).unwrap();
        assert_eq!(number.bytes, text.as_bytes());
        assert_eq!(f32::of(&number).map(f32::to_bits), f32::parse(text).map(f32::to_bits), "{text}");
        assert_eq!(f64::of(&number).map(f64::to_bits), f64::parse(text).map(f64::to_bits), "{text}");
        assert_eq!(i64::of(&number), i64::parse(text), "{text}");
        assert_eq!(u64::of(&number), u64::parse(text), "{text}");
        assert_eq!(i8::of(&number), i8::parse(text), "{text}");
        assert_eq!(u8::of(&number), u8::parse(text), "{text}");
    }

    #[test]
    fn hard_cases_are_read_as_the_library_does() {
        for text in [
            "0",
            "-0",
            "-0.0",
            "127",
            "128",
            "-128",
            "-129",
            "255",
            "256",
            "-1",
            "18446744073709551615",
            "16777217",
            "18446744073709551616",
            "9223372036854775807",
            "-9223372036854775808",
            "9007199254740993",
            "3e2",
            "1e400",
            "0.1",
            "3.4028235e38",
            "3.4028236e38",
            "1.401298464324817e-45",
            "0.000000000000000000000000000000000001",
            "33554435.0",
            "1.00000005960464477",
            "1.000000178813934326171875",
            "999999999999999999",
            "4.5",
            "1e-400",
        ] {
            same(text);
        }
    }

    const NUMBERS: &str = r"-?(0|[1-9][0-9]{0,20})(\.[0-9]{1,24})?([eE][+-]?[0-9]{1,3})?";

    proptest! {
        #[test]
        fn numbers_are_read_as_the_library_does(text in NUMBERS) {
            same(&text);
        }

        #[test]
        fn floats_come_back(value: f32, exact: i32) {
            prop_assume!(value.is_finite());
            same(&value.to_string());
            // Halfway between two floats, and next to there.
            let middle = (f64::from(value.abs()) + f64::from(value.abs().next_up())) / 2.0;
            if middle.is_finite() && middle < 1e15 {
                same(&middle.to_string());
                same(&middle.next_up().to_string());
            }
            same(&exact.to_string());
        }
    }
}
