//! PostgreSQL's hash functions for bytes and integers, with seed 0: Bob Jenkins' lookup3, as
//! `src/common/hashfn.c` has it on little-endian machines.
//!
//! The values are the same on all supported majors, yet PostgreSQL does not promise that they stay.

/// The three words that the hash mixes.
struct State {
    a: u32,
    b: u32,
    c: u32,
}

impl State {
    fn new(length: usize) -> Self {
        // A value of PostgreSQL is shorter than 1 GB.
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let start = 0x9e37_79b9_u32.wrapping_add(length).wrapping_add(3_923_095);
        Self { a: start, b: start, c: start }
    }

    /// Adds twelve bytes.
    fn add(&mut self, [a, b, c]: [u32; 3]) {
        self.a = self.a.wrapping_add(a);
        self.b = self.b.wrapping_add(b);
        self.c = self.c.wrapping_add(c);
    }

    /// The macro `mix` of `hashfn.c`.
    fn mix(&mut self) {
        let Self { mut a, mut b, mut c } = *self;
        let step = |x: &mut u32, y: u32, z: &mut u32, bits: u32| {
            *x = x.wrapping_sub(*z) ^ z.rotate_left(bits);
            *z = z.wrapping_add(y);
        };

        step(&mut a, b, &mut c, 4);
        step(&mut b, c, &mut a, 6);
        step(&mut c, a, &mut b, 8);
        step(&mut a, b, &mut c, 16);
        step(&mut b, c, &mut a, 19);
        step(&mut c, a, &mut b, 4);

        *self = Self { a, b, c };
    }

    /// The macro `final` of `hashfn.c`.
    fn finish(self) -> u64 {
        let Self { mut a, mut b, mut c } = self;
        let step = |x: &mut u32, y: u32, bits: u32| *x = (*x ^ y).wrapping_sub(y.rotate_left(bits));

        step(&mut c, b, 14);
        step(&mut a, c, 11);
        step(&mut b, a, 25);
        step(&mut c, b, 16);
        step(&mut a, c, 4);
        step(&mut b, a, 14);
        step(&mut c, b, 24);

        u64::from(b) << 32 | u64::from(c)
    }
}

fn words(bytes: &[u8; 12]) -> [u32; 3] {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = *bytes;
    [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_le_bytes)
}

/// `hash_bytes_extended(key, length, 0)`.
pub(super) fn hash_bytes(key: &[u8]) -> u64 {
    let mut state = State::new(key.len());
    let (blocks, rest) = key.as_chunks::<12>();

    for block in blocks {
        state.add(words(block));
        state.mix();
    }

    let mut last = [0; 12];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }

    // The lowest byte of the last word is reserved for the length.
    let [a, b, c] = words(&last);
    state.add([a, b, c << 8]);
    state.finish()
}

/// `hash_bytes_uint32_extended(key, 0)`.
pub(super) fn hash_u32(key: u32) -> u64 {
    let mut state = State::new(size_of::<u32>());
    state.add([key, 0, 0]);
    state.finish()
}

/// `hashint4extended(0, record)`, where the hash of a record is the seed of a hash.
///
/// `hash_record_extended` is a sum of the hashes of the cells, each times a power of 31. So a sum
/// of it over rows is one of column sums, which stays when two rows exchange values. A hash of it
/// binds the cells of a row to each other.
pub(super) fn hash_row(record: u64) -> u64 {
    let mut state = State::new(size_of::<u32>());
    if record != 0 {
        let [low, high] = halves(record.cast_signed());
        state.add([high, low, 0]);
        state.mix();
    }
    state.finish()
}

/// `hashint8extended(value, 0)` of `access/hash/hashfunc.c`. It folds the halves into one word, so
/// that a value has the hash of an `int4` that is equal to it.
pub(super) fn hash_i64(value: i64) -> u64 {
    let [low, high] = halves(value);
    hash_u32(low ^ if value >= 0 { high } else { !high })
}

/// Returns the low and the high word.
fn halves(value: i64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [[a, b, c, d], [e, f, g, h]].map(u32::from_le_bytes)
}

/// `hashfloat8extended(value, 0)` of `access/hash/hashfunc.c`: both zeros are 0, which is also the
/// hash of NULL, and all NaNs are one.
pub(super) fn hash_f64(value: f64) -> u64 {
    /// `get_float8_nan` of `utils/float.h`.
    const NAN: u64 = 0x7ff8_0000_0000_0000;

    if value == 0.0 {
        return 0;
    }
    let bits = if value.is_nan() { NAN } else { value.to_bits() };
    hash_bytes(&bits.to_le_bytes())
}

/// `hash_numeric_extended(value * 10^-scale, 0)` of `utils/adt/numeric.c`: the digits of base
/// 10,000 without zeros at both ends, and their weight. Sign and scale do not count.
pub(super) fn hash_numeric(value: i128, scale: u8) -> u64 {
    let mut wide = value.unsigned_abs();
    if wide == 0 {
        return u64::MAX;
    }

    // The groups begin at the point, so the lowest group may have fewer than four digits.
    let mut groups = Groups::default();
    let partial = u32::from(scale % 4);
    if partial > 0 {
        let base = 10_u16.pow(partial);
        let digit = wide % u128::from(base);
        groups.push(u16::try_from(digit).unwrap_or_default() * (10_000 / base));
        wide /= u128::from(base);
    }

    // A division of 64 bits is many times faster than one of 128.
    let mut narrow = loop {
        match u64::try_from(wide) {
            Ok(narrow) => break narrow,
            Err(_) => groups.push(u16::try_from(wide % 10_000).unwrap_or_default()),
        }
        wide /= 10_000;
    };
    while narrow > 0 {
        groups.push(u16::try_from(narrow % 10_000).unwrap_or_default());
        narrow /= 10_000;
    }

    // The weight of the first group, where the group in front of the point has 0.
    let weight = groups.count - i64::from(scale.div_ceil(4)) - 1;
    hash_bytes(groups.significant()) ^ weight.cast_unsigned()
}

/// The groups of a number, which come from the last to the first.
#[derive(Default)]
struct Groups {
    bytes: [u8; 2 * Self::MAX],
    /// The bytes in use, which are the last ones.
    used: usize,
    count: i64,
}

impl Groups {
    /// A value has 39 decimal digits at most, and the point may cut one group of four.
    const MAX: usize = 11;

    fn push(&mut self, group: u16) {
        self.count += 1;
        // Zeros at the end do not count.
        if self.used == 0 && group == 0 {
            return;
        }

        let start = self.bytes.len().saturating_sub(self.used + 2);
        if let Some(to) = self.bytes.get_mut(start..start + 2) {
            to.copy_from_slice(&group.to_le_bytes());
            self.used += 2;
        }
    }

    fn significant(&self) -> &[u8] {
        self.bytes.get(self.bytes.len() - self.used..).unwrap_or_default()
    }
}

/// The step of `hash_record_extended` (`utils/adt/rowtypes.c`) from one column to the next; the
/// hash of NULL is 0.
pub(super) fn combine(row: u64, cell: u64) -> u64 {
    row.wrapping_mul(31).wrapping_add(cell)
}

/// The numbers are what a server of PostgreSQL 15 prints, by the functions that are named.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_hash_as_hashtextextended_does() {
        let cases = [
            ("", -6_939_563_903_564_495_251),
            ("a", 3_591_986_179_850_072_241),
            ("hello world", 6_947_366_892_317_592_103),
            ("hello world!", -2_866_487_628_948_787_489),
            ("abcdefghijklmnopqrstuvwxyz", -6_612_928_417_832_572_997),
            ("ä€𝄞", -7_151_967_561_108_975_793),
        ];
        for (text, hash) in cases {
            assert_eq!(hash_bytes(text.as_bytes()).cast_signed(), hash, "{text:?}");
        }
        assert_eq!(hash_bytes(b"\x00\xff\x80").cast_signed(), 6_419_882_018_721_155_235);
    }

    #[test]
    fn integers_hash_as_hashint4extended_does() {
        let cases = [
            (0, 4_154_612_158_245_552_303),
            (1, -3_670_598_878_359_251_130),
            (-1, -1_888_257_769_727_981_238),
            (i32::MAX, -9_109_110_466_470_504_941),
            (i32::MIN, 1_977_219_185_673_256_887),
        ];
        for (value, hash) in cases {
            assert_eq!(hash_u32(value.cast_unsigned()).cast_signed(), hash, "{value}");
            assert_eq!(hash_i64(value.into()).cast_signed(), hash, "{value}");
        }
    }

    #[test]
    fn floats_hash_as_hashfloat8extended_does() {
        let cases = [
            (0.0, 0),
            (-0.0, 0),
            (1.5, 6_158_159_405_676_898_674),
            (f64::NAN, 4_719_788_943_832_604_568),
            (-f64::NAN, 4_719_788_943_832_604_568),
            (f64::INFINITY, -4_973_912_021_728_129_854),
            (0.1, -4_179_333_574_236_083_663),
            (f64::from(0.1_f32), 45_699_830_491_884_902),
        ];
        for (value, hash) in cases {
            assert_eq!(hash_f64(value).cast_signed(), hash, "{value}");
        }
    }

    #[test]
    fn numbers_hash_as_hash_numeric_extended_does() {
        let nines = 10_i128.pow(38) - 1;
        let cases = [
            (0, 0, -1),
            (0, 38, -1),
            (1, 0, -7_507_508_252_608_306_360),
            (-100, 2, -7_507_508_252_608_306_360),
            (1, 2, -2_026_427_994_494_054_900),
            (1_234_567, 2, 4_423_984_217_018_940_161),
            (10_000, 0, -7_507_508_252_608_306_359),
            (1, 4, 7_507_508_252_608_306_359),
            (1, 5, 4_472_182_450_358_367_964),
            (9_999_999_999, 2, 6_791_266_660_054_701_057),
            (nines, 10, -4_750_972_186_539_380_647),
            (nines, 0, -1_925_741_174_996_242_661),
            (nines, 38, 4_750_972_186_539_380_640),
            (1, 38, -2_026_427_994_494_054_907),
            (10_i128.pow(37), 0, -219_908_382_603_017_353),
            (10_i128.pow(8), 2, 2_026_427_994_494_054_898),
        ];
        for (value, scale, hash) in cases {
            assert_eq!(hash_numeric(value, scale).cast_signed(), hash, "{value} e-{scale}");
        }
    }

    #[test]
    fn a_record_is_hashed_as_the_seed_of_hashint4extended() {
        let cases = [
            (0, 4_154_612_158_245_552_303),
            (1, 434_346_878_670_890_809),
            (-4_592_249_191_205_652_913, 2_210_293_067_240_426_252),
            (i64::MIN, 8_438_955_472_359_914_468),
        ];
        for (record, hash) in cases {
            assert_eq!(hash_row(record.cast_unsigned()).cast_signed(), hash, "{record}");
        }
    }

    #[test]
    fn cells_combine_as_hash_record_extended_does() {
        let cells = [hash_u32(1), 0, hash_bytes(b"x")];
        let row = cells.into_iter().fold(0, combine);
        assert_eq!(row.cast_signed(), -4_592_249_191_205_652_913);
    }

    proptest::proptest! {
        #[test]
        fn every_number_has_a_hash(value in proptest::num::i128::ANY, scale in 0_u8..=38) {
            let _ = hash_numeric(value, scale);
        }
    }
}
