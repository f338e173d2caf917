//! The parameters of a request: what there are, which are read here and described in `/api/openapi.json`.

use std::str::FromStr;

use super::problem::Problem;

/// A parameter of a route.
#[derive(Clone, Copy, Debug)]
pub(super) struct Param {
    pub(super) name: &'static str,
    /// What it is for.
    pub(super) about: &'static str,
    pub(super) is_required: bool,
    /// Whether it may be given more than once.
    pub(super) is_repeated: bool,
}

impl Param {
    pub(super) const fn new(name: &'static str, about: &'static str) -> Self {
        Self { name, about, is_required: false, is_repeated: false }
    }

    pub(super) const fn required(self) -> Self {
        Self { is_required: true, ..self }
    }

    pub(super) const fn repeated(self) -> Self {
        Self { is_repeated: true, ..self }
    }
}

/// What a request has given.
#[derive(Debug)]
pub(super) struct Given(Vec<(String, String)>);

impl Given {
    /// Reads a query string. Nothing is passed over: a parameter that there is not, or that is given twice, is an error.
    pub(super) fn read(query: Option<&str>, known: &[&[Param]]) -> Result<Self, Problem> {
        let pairs = url::form_urlencoded::parse(query.unwrap_or_default().as_bytes());
        let pairs: Vec<(String, String)> = pairs.into_owned().collect();
        let all = || known.iter().copied().flatten();
        for (place, (name, value)) in pairs.iter().enumerate() {
            let Some(param) = all().find(|param| param.name == name) else {
                let names: Vec<&str> = all().map(|param| param.name).collect();
                return Err(Problem::bad(format!(
                    "there is no parameter {name:?}; there are {}",
                    names.join(", ")
                )));
            };
            if value.contains('\0') {
                return Err(Problem::bad(format!("{name} has a zero byte, which no text of a database has")));
            }
            let is_again = pairs.iter().take(place).any(|(other, _)| other == name);
            if is_again && !param.is_repeated {
                return Err(Problem::bad(format!("{name} is given twice")));
            }
        }
        let given = Self(pairs);
        for param in all().filter(|param| param.is_required) {
            if given.text(param.name).is_none() {
                return Err(Problem::bad(format!("{} is missing: {}", param.name, param.about)));
            }
        }
        Ok(given)
    }

    /// The same of one whose askers may give more than is known: that is passed over.
    pub(super) fn read_known(query: Option<&str>, known: &[Param]) -> Result<Self, Problem> {
        let pairs = url::form_urlencoded::parse(query.unwrap_or_default().as_bytes());
        let is_known = |name: &str| known.iter().any(|param| param.name == name);
        let text = url::form_urlencoded::Serializer::new(String::new())
            .extend_pairs(pairs.filter(|(name, _)| is_known(name)))
            .finish();
        Self::read(Some(&text), &[known])
    }

    /// The value, if it was given and is not empty.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(given, value)| given == name && !value.is_empty());
        found.map(|(_, value)| value.as_str())
    }

    /// The value, if it was given: it may be empty.
    pub(super) fn exact(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(given, _)| given == name).map(|(_, value)| value.as_str())
    }

    /// All values.
    pub(super) fn all(&self, name: &str) -> Vec<String> {
        self.0.iter().filter(|(given, _)| given == name).map(|(_, value)| value.clone()).collect()
    }

    /// The value as something else.
    pub(super) fn parsed<T: FromStr>(&self, name: &str, accepted: &str) -> Result<Option<T>, Problem> {
        let parse = |text: &str| {
            text.parse().map_err(|_| Problem::bad(format!("{name} is {text:?}, but must be {accepted}")))
        };
        self.text(name).map(parse).transpose()
    }

    /// The value as a yes or no; no, if it was not given.
    pub(super) fn flag(&self, name: &str) -> Result<bool, Problem> {
        match self.exact(name) {
            None | Some("false") => Ok(false),
            Some("" | "true") => Ok(true),
            Some(other) => Err(Problem::bad(format!("{name} is {other:?}, but must be true or false"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [Param; 3] = [
        Param::new("name", "the name").required(),
        Param::new("metric", "a metric").repeated(),
        Param::new("fresh", "whether"),
    ];

    #[test]
    fn what_is_given_is_read_and_nothing_is_passed_over() {
        let given = Given::read(Some("name=a%26b+c&metric=x&metric=y&fresh"), &[&KNOWN]).unwrap();
        assert_eq!(given.text("name"), Some("a&b c"));
        assert_eq!(given.all("metric"), ["x", "y"]);
        assert!(given.flag("fresh").unwrap());
        for wrong in ["", "name=", "name=a&nmae=b", "name=a&name=b", "name=a%00b"] {
            assert!(Given::read(Some(wrong), &[&KNOWN]).is_err(), "{wrong}");
        }
        assert!(Given::read(Some("name=a&fresh=1"), &[&KNOWN]).unwrap().flag("fresh").is_err());
    }
}
