//! What is asked of drift.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use chrono::{DateTime, Utc};

use super::profile::Profile;
use super::shown;
use crate::reader::{BinnedQuery, Bins, When};
use crate::tables::Kind;
use crate::{Error, Result};

/// What the rows of each bin are compared with.
#[derive(Clone, Debug, PartialEq)]
pub enum Against {
    /// The model's rows from the first time up to the second.
    Window(DateTime<Utc>, DateTime<Utc>),
    /// Those of the bin before.
    Previous,
    /// Those of the bin that was so long ago: a length, or days, weeks, months or years of the calendar.
    Ago(Bins),
    /// Those of another version of the model, over the same range.
    Version(String),
    /// What the model was trained with.
    Profile(Profile),
}

impl fmt::Display for Against {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Window(start, end) => write!(f, "{}..{}", shown(*start), shown(*end)),
            Self::Previous => f.write_str("previous"),
            Self::Ago(ago) => write!(f, "-{ago}"),
            Self::Version(version) => write!(f, "version:{version}"),
            Self::Profile(_) => f.write_str("profile"),
        }
    }
}

/// A reference as it is written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Named {
    Window(When, When),
    Previous,
    Ago(Bins),
    Version(String),
    /// Of a file, or Scouter's.
    Profile(Option<PathBuf>),
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let refused = || {
            format!(
                "{text:?} is not a reference: write 2026-01-01..2026-02-01, previous, -365d, version:1.3.0 or profile"
            )
        };
        match text {
            "previous" => return Ok(Self::Previous),
            "profile" => return Ok(Self::Profile(None)),
            _ => {}
        }
        if let Some(version) = text.strip_prefix("version:") {
            return Ok(Self::Version(version.to_owned()));
        }
        if let Some(file) = text.strip_prefix("profile:") {
            return Ok(Self::Profile(Some(file.into())));
        }
        if let Some((from, to)) = text.split_once("..") {
            let when = |text: &str| text.parse::<When>().map_err(|_| refused());
            return Ok(Self::Window(when(from)?, when(to)?));
        }
        let ago = text.strip_prefix('-').and_then(|ago| ago.parse().ok());
        ago.map(Self::Ago).ok_or_else(refused)
    }
}

impl Named {
    /// The reference, unless it is a profile, which has to be read first.
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if it is one, or one of its times is none.
    pub(crate) fn at(&self, time: impl Fn(When) -> Result<DateTime<Utc>>) -> Result<Against> {
        Ok(match self {
            Self::Window(from, to) => Against::Window(time(*from)?, time(*to)?),
            Self::Previous => Against::Previous,
            Self::Ago(ago) => Against::Ago(*ago),
            Self::Version(version) => Against::Version(version.clone()),
            Self::Profile(_) => {
                let detail = "the profile of a file is read by the command line only".to_owned();
                return Err(Error::Query { detail });
            }
        })
    }
}

macro_rules! names {
    ($of:ident, $about:literal, $($(#[$doc:meta])* $variant:ident $name:literal),+ $(,)?) => {
        #[doc = $about]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $of {
            $($(#[$doc])* $variant,)+
        }

        impl $of {
            /// Its name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }

        impl FromStr for $of {
            type Err = String;

            fn from_str(text: &str) -> std::result::Result<Self, String> {
                match text {
                    $($name => Ok(Self::$variant),)+
                    _ => Err(format!("{text:?} is none of {}", [$($name),+].join(", "))),
                }
            }
        }
    };
}

names!(
    Measure,
    "How far two samples are from each other; `drift/measures` has the formulae.",
    /// Population stability index, of counts.
    Psi "psi",
    /// Jensen-Shannon distance to base 2, of counts: 0 to 1.
    Js "js",
    /// Hellinger distance, of counts: 0 to 1.
    Hellinger "hellinger",
    /// Total variation distance, of counts: 0 to 1.
    Tvd "tvd",
    /// Chi-square statistic, of counts.
    Chi2 "chi2",
    /// Standardized mean difference, of values; negative where the mean is below that of the reference.
    Smd "smd",
    /// Kolmogorov-Smirnov statistic, of values: 0 to 1. Reads each value, and no profile has any.
    Ks "ks",
);

names!(
    Smoothing,
    "What is done about bins that one of two samples has nothing in, of which `psi` would be infinite.",
    /// 1e-10 is added to each share, as Scouter does.
    Scouter "scouter",
    /// A share of nothing is 0.0001, or a millionth of the smallest share if that is no larger, as Evidently does.
    Evidently "evidently",
    /// 1 is added to each count.
    Count "count",
    /// Nothing.
    Off "none",
);

/// From which score on a bin is over.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Threshold {
    /// What samples of one distribution pass with this probability: a chi-square rule, Smirnov's for `ks`, the normal one for `smd`.
    Chance(f64),
    /// This score.
    Fixed(f64),
    /// The mean of the reference's own scores against all of it, and so many of their standard deviations.
    Spread(f64),
}

impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chance(alpha) => write!(f, "chi2:{alpha}"),
            Self::Fixed(limit) => write!(f, "{limit}"),
            Self::Spread(deviations) => write!(f, "sd:{deviations}"),
        }
    }
}

impl FromStr for Threshold {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let refused = || {
            format!(
                "{text:?} is not a threshold: write a number, chi2:0.05 (what chance exceeds so often, from 1e-9 to 0.5), or sd:3 (of the reference's own scores)"
            )
        };
        let number = |text: &str| {
            text.parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0).ok_or_else(refused)
        };
        match text.split_once(':') {
            Some(("chi2", alpha)) => {
                let alpha = number(alpha)?;
                if CHANCES.contains(&alpha) { Ok(Self::Chance(alpha)) } else { Err(refused()) }
            }
            Some(("sd", deviations)) => Ok(Self::Spread(number(deviations)?)),
            None if text == "chi2" => Ok(Self::Chance(ALPHA)),
            None if text == "sd" => Ok(Self::Spread(DEVIATIONS)),
            _ => Ok(Self::Fixed(number(text)?)),
        }
    }
}

/// Probabilities for which the quantiles are right to six digits.
const CHANCES: std::ops::RangeInclusive<f64> = 1e-9..=0.5;

/// Scouter's default.
const ALPHA: f64 = 0.05;

/// That of `NannyML`.
const DEVIATIONS: f64 = 3.0;

/// Of the total variation distance, for which there is no rule of chance.
const TVD: f64 = 0.1;

/// A question of drift.
#[derive(Clone, Debug, PartialEq)]
pub struct DriftQuery {
    kind: Kind,
    query: BinnedQuery,
    against: Against,
    measure: Measure,
    /// If it was asked for.
    smoothing: Option<Smoothing>,
    threshold: Threshold,
    top: Option<usize>,
}

impl DriftQuery {
    /// How far the rows that a query asks for are from others, in each of its bins; of `psi` by the population stability index, of `custom` and
    /// `spc` by the standardized mean difference.
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if the kind is none of `custom`, `psi` and `spc`.
    pub fn new(kind: Kind, query: BinnedQuery, against: Against) -> Result<Self> {
        if !Kind::drift().contains(&kind) {
            return Err(Error::Query {
                detail: format!("{} has no drift: custom, psi and spc have", kind.name()),
            });
        }
        let measure = if kind == Kind::psi() { Measure::Psi } else { Measure::Smd };
        let threshold = Threshold::Chance(ALPHA);
        Ok(Self { kind, query, against, measure, smoothing: None, threshold, top: None })
    }

    /// By this measure, with its own default for the threshold.
    #[must_use]
    pub fn by(mut self, measure: Measure) -> Self {
        self.measure = measure;
        self.threshold =
            if measure == Measure::Tvd { Threshold::Fixed(TVD) } else { Threshold::Chance(ALPHA) };
        self
    }

    /// With this done about empty bins: of `psi`, and of `chi2` against a profile. The others need nothing.
    #[must_use]
    pub const fn smoothed(mut self, smoothing: Smoothing) -> Self {
        self.smoothing = Some(smoothing);
        self
    }

    /// Over from this score on.
    #[must_use]
    pub const fn over(mut self, threshold: Threshold) -> Self {
        self.threshold = threshold;
        self
    }

    /// Only the so many series that moved most.
    #[must_use]
    pub const fn top(mut self, count: usize) -> Self {
        self.top = Some(count);
        self
    }

    /// Makes sure that there is an answer.
    pub(super) fn check(&self) -> Result<()> {
        let of_counts = !matches!(self.measure, Measure::Smd | Measure::Ks);
        let wrong = |detail: String| Err(Error::Query { detail });
        if of_counts != (self.kind == Kind::psi()) {
            let measures = if of_counts { "smd and ks" } else { "psi, js, hellinger, tvd and chi2" };
            return wrong(format!("{} has no {}: it has {measures}", self.kind.name(), self.measure.name()));
        }
        let is_profile = matches!(self.against, Against::Profile(_));
        if is_profile && self.measure == Measure::Ks {
            return wrong("a profile has no values that ks could be of".to_owned());
        }
        if self.smoothing.is_some_and(|smoothing| smoothing != Smoothing::Off) && !self.is_smoothed() {
            let detail = format!(
                "{} has no use for smoothing here: psi has, and chi2 of a profile",
                self.measure.name()
            );
            return wrong(detail);
        }
        if is_profile && self.smoothing == Some(Smoothing::Count) {
            return wrong(
                "a profile has shares and no counts to add 1 to: choose another smoothing".to_owned(),
            );
        }
        let is_fixed = matches!(self.against, Against::Window(..) | Against::Version(_));
        match self.threshold {
            Threshold::Spread(_) if !is_fixed => {
                wrong("sd needs a reference of several bins: a time, or a version".to_owned())
            }
            Threshold::Chance(_) if self.measure == Measure::Tvd => {
                wrong("tvd has no rule of chance: write a number, or sd:3".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// The kind of rows.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The rows.
    #[must_use]
    pub const fn query(&self) -> &BinnedQuery {
        &self.query
    }

    /// What they are compared with.
    #[must_use]
    pub const fn against(&self) -> &Against {
        &self.against
    }

    /// By what.
    #[must_use]
    pub const fn measure(&self) -> Measure {
        self.measure
    }

    /// Whether bins of nothing have to be thought of.
    fn is_smoothed(&self) -> bool {
        let is_profile = matches!(self.against, Against::Profile(_));
        self.measure == Measure::Psi || (self.measure == Measure::Chi2 && is_profile)
    }

    /// What is done about empty bins.
    #[must_use]
    pub fn smoothing(&self) -> Smoothing {
        let default = if self.is_smoothed() { Smoothing::Scouter } else { Smoothing::Off };
        self.smoothing.unwrap_or(default)
    }

    /// From where on they are over.
    #[must_use]
    pub const fn threshold(&self) -> Threshold {
        self.threshold
    }

    pub(super) const fn most(&self) -> Option<usize> {
        self.top
    }
}
