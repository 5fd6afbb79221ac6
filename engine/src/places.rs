//! Where a process has guest memory mapped: as one mapping, or, where the memory is made of several files (a stock
//! QEMU's backends, one for each NUMA node), as one for each, anywhere.

use serde::{Deserialize, Serialize};

use crate::memory::{MAX_REGIONS, PAGE_SIZE};

/// One mapping of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Where it begins in the guest's memory, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Its address in the process that has it.
    pub address: u64,
}

impl Place {
    fn part(self, from: u64, to: u64) -> Option<Self> {
        let (start, end) = (self.offset.max(from), (self.offset + self.len).min(to));
        let address = self.address + start.wrapping_sub(self.offset);
        (start < end).then(|| Self { offset: start - from, len: end - start, address })
    }
}

/// The mappings of guest memory in a process, in the order of its bytes, without a gap in those.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Place>", into = "Vec<Place>")]
pub struct Places(Vec<Place>);

/// Why places were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest memory cannot be mapped so: there are none or too many mappings, or one has no whole pages")]
pub struct PlacesError;

impl TryFrom<Vec<Place>> for Places {
    type Error = PlacesError;

    fn try_from(places: Vec<Place>) -> Result<Self, PlacesError> {
        let made = Self::new(places.iter().map(|place| (place.address, place.len)))?;
        (made.0 == places).then_some(made).ok_or(PlacesError)
    }
}

impl From<Places> for Vec<Place> {
    fn from(places: Places) -> Self {
        places.0
    }
}

impl Places {
    /// Mappings at these addresses, so long.
    ///
    /// Errors: there are none or more than a guest's memory has regions, one is empty or has no whole pages, or ends past
    /// the last address.
    pub fn new(mappings: impl IntoIterator<Item = (u64, u64)>) -> Result<Self, PlacesError> {
        let mut offset = 0u64;
        let place = |(address, len): (u64, u64)| {
            let whole = len > 0 && [address, len].iter().all(|value| value % PAGE_SIZE == 0);
            address.checked_add(len).filter(|_| whole).ok_or(PlacesError)?;
            let place = Place { offset, len, address };
            offset = offset.checked_add(len).ok_or(PlacesError)?;
            Ok(place)
        };
        let places = mappings.into_iter().map(place).collect::<Result<Vec<_>, _>>()?;
        (1..=MAX_REGIONS).contains(&places.len()).then_some(Self(places)).ok_or(PlacesError)
    }

    /// A mapping of so many bytes at this address.
    pub(crate) fn one(address: u64, len: u64) -> Self {
        Self(vec![Place { offset: 0, len, address }])
    }

    /// Those of `len` bytes from `offset` on, which are counted from there.
    pub(crate) fn part(&self, offset: u64, len: u64) -> Self {
        Self(self.0.iter().filter_map(|place| place.part(offset, offset.saturating_add(len))).collect())
    }

    /// The mappings.
    pub fn each(&self) -> impl Iterator<Item = Place> {
        self.0.iter().copied()
    }

    /// How many bytes they have.
    pub fn bytes(&self) -> u64 {
        self.0.last().map_or(0, |last| last.offset + last.len)
    }

    /// How many pages they have.
    pub fn pages(&self) -> u64 {
        self.bytes() / PAGE_SIZE
    }

    /// Where byte `offset` is, and how many follow in the same mapping, itself included. `None`: it is past the end.
    pub(crate) fn at(&self, offset: u64) -> Option<(u64, u64)> {
        self.0.iter().find_map(|place| {
            let within = offset.checked_sub(place.offset).filter(|within| *within < place.len)?;
            Some((place.address + within, place.len - within))
        })
    }

    /// Which byte is at this address.
    pub(crate) fn offset_of(&self, address: u64) -> Option<u64> {
        self.0.iter().find_map(|place| {
            let within = address.checked_sub(place.address).filter(|within| *within < place.len)?;
            Some(place.offset + within)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: u64 = PAGE_SIZE;

    #[test]
    fn each_byte_has_its_place_and_each_address_its_byte() {
        let places = Places::new([(100 * P, 2 * P), (10 * P, 3 * P), (200 * P, P)]).unwrap();
        assert_eq!((places.bytes(), places.pages()), (6 * P, 6));
        for (offset, at) in [
            (0, (100 * P, 2 * P)),
            (2 * P - 1, (102 * P - 1, 1)),
            (2 * P, (10 * P, 3 * P)),
            (5 * P + 7, (200 * P + 7, P - 7)),
        ] {
            assert_eq!(places.at(offset), Some(at), "{offset}");
            assert_eq!(places.offset_of(at.0), Some(offset));
        }
        assert_eq!((places.at(6 * P), places.offset_of(102 * P), places.offset_of(0)), (None, None, None));
        let part = places.part(P, 3 * P);
        assert_eq!(part, Places::new([(101 * P, P), (10 * P, 2 * P)]).unwrap());
        assert_eq!(places.part(0, 6 * P), places);
    }

    #[test]
    fn what_cannot_be_mapped_so_is_refused() {
        let bad: [&[(u64, u64)]; 6] =
            [&[], &[(0, 0)], &[(1, P)], &[(P, 5)], &[(u64::MAX - P + 1, P)], &[(0, P); MAX_REGIONS + 1]];
        for mappings in bad {
            assert!(Places::new(mappings.iter().copied()).is_err(), "{mappings:?}");
        }
        let places = Places::new([(8 * P, P), (P, P)]).unwrap();
        let text = serde_json::to_string(&places).unwrap();
        assert_eq!(serde_json::from_str::<Places>(&text).unwrap(), places);
        let gap = text.replace(&format!("\"offset\":{P}"), "\"offset\":0");
        assert!(gap != text && serde_json::from_str::<Places>(&gap).is_err(), "{gap}");
    }
}
