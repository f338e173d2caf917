//! [`HoursOfDay`]: when heavy work may run.

use std::str::FromStr;

pub(super) const ACCEPTED: &str = "two hours of the day in UTC, such as 22-6; `all`; or `none`";

/// Hours of the day, in UTC: from one on, up to but without another, over midnight if that is less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoursOfDay {
    start: u32,
    end: u32,
}

impl HoursOfDay {
    /// The whole day.
    pub const ALL: Self = Self { start: 0, end: 24 };

    /// Never.
    pub const NONE: Self = Self { start: 0, end: 0 };

    /// Whether an hour (0 to 23) is among them.
    #[must_use]
    pub const fn contains(self, hour: u32) -> bool {
        if self.start <= self.end {
            self.start <= hour && hour < self.end
        } else {
            self.start <= hour || hour < self.end
        }
    }
}

impl FromStr for HoursOfDay {
    type Err = ();

    /// Reads `22-6`, `all` or `none`.
    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "all" => return Ok(Self::ALL),
            "none" => return Ok(Self::NONE),
            _ => {}
        }
        let (start, end) = text.split_once('-').ok_or(())?;
        let hour = |text: &str| text.trim().parse::<u32>().map_err(|_| ());
        match (hour(start)?, hour(end)?) {
            // Equal ones could mean all or nothing.
            (start, end) if start < 24 && end <= 24 && start != end => Ok(Self { start, end }),
            _ => Err(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_may_pass_midnight() {
        let night: HoursOfDay = "22-6".parse().unwrap();
        let hours: Vec<u32> = (0..24).filter(|hour| night.contains(*hour)).collect();
        assert_eq!(hours, [0, 1, 2, 3, 4, 5, 22, 23]);
        assert_eq!("0-24".parse(), Ok(HoursOfDay::ALL));
        assert!((0..24).all(|hour| HoursOfDay::ALL.contains(hour) && !HoursOfDay::NONE.contains(hour)));
        assert_eq!("22 - 6".parse(), Ok(night));
        for wrong in ["", "22", "6-6", "24-1", "1-25", "-1-3", "noon-night"] {
            assert_eq!(wrong.parse::<HoursOfDay>(), Err(()), "{wrong}");
        }
    }
}
