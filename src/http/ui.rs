//! The page: files of the program, which load nothing from elsewhere.

use std::sync::LazyLock;

use axum::Router;
use axum::extract::{OriginalUri, Path};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;

use super::problem::Problem;
use super::tag::Tag;

/// What the page may load: its own files, and pictures that it has drawn itself.
const POLICY: &str = "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

/// A file of the page.
struct File {
    name: &'static str,
    content_type: &'static str,
    bytes: &'static [u8],
    tag: Tag,
}

const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";

macro_rules! files {
    ($($name:literal $content_type:expr),+ $(,)?) => {
        [$(($name, $content_type, include_bytes!(concat!("ui/", $name)).as_slice())),+]
    };
}

static FILES: LazyLock<Vec<File>> = LazyLock::new(|| {
    let files = files![
        "index.html" "text/html; charset=utf-8",
        "icon.svg" "image/svg+xml",
        "style.css" STYLE,
        "app.js" SCRIPT,
        "api.js" SCRIPT,
        "calendar.js" SCRIPT,
        "charts.js" SCRIPT,
        "dom.js" SCRIPT,
        "format.js" SCRIPT,
        "history.js" SCRIPT,
        "picker.js" SCRIPT,
        "route.js" SCRIPT,
        "state.js" SCRIPT,
        "table.js" SCRIPT,
        "theme.js" SCRIPT,
        "uPlot.iife.min.js" SCRIPT,
        "uPlot.min.css" STYLE,
        "uPlot.LICENSE" "text/plain; charset=utf-8",
    ];
    let file = |(name, content_type, bytes)| File { name, content_type, bytes, tag: Tag::of_bytes(bytes) };
    files.into_iter().map(file).collect()
});

pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/", get(async |OriginalUri(asked): OriginalUri| to_page(asked.path())))
        .route("/ui", get(async || to("ui/")))
        .route("/ui/", get(async |headers: HeaderMap| file("index.html", &headers)))
        .route("/ui/{file}", get(async |Path(name): Path<String>, headers: HeaderMap| file(&name, &headers)))
}

/// Leads to the page from the root, which is asked for under this path: the routes may be nested, and then it ends without a slash. The
/// place is told from the path's last part on (RFC 3986, section 5.2.3), since a proxy may have taken away what is before it.
fn to_page(asked: &str) -> Response {
    match asked.rsplit('/').next() {
        None | Some("") => to("ui/"),
        Some(last) => to(&format!("{last}/ui/")),
    }
}

fn to(place: &str) -> Response {
    match HeaderValue::from_str(place) {
        Ok(place) => (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, place)]).into_response(),
        Err(_) => Problem::not_found(place).into_response(),
    }
}

fn file(name: &str, headers: &HeaderMap) -> Response {
    let Some(file) = FILES.iter().find(|file| file.name == name) else {
        return Problem::not_found(&format!("/ui/{name}")).into_response();
    };
    let answer = || {
        ([(header::CONTENT_TYPE, HeaderValue::from_static(file.content_type))], file.bytes).into_response()
    };
    let mut response = file.tag.unchanged(headers).unwrap_or_else(|| file.tag.put_into(answer()));
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The most bytes of the page.
    const BYTES_MAX: usize = 150 << 10;

    #[test]
    fn every_file_of_the_folder_is_served_and_all_are_small() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/http/ui");
        let mut found: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        let mut served: Vec<&str> = FILES.iter().map(|file| file.name).collect();
        found.sort();
        served.sort_unstable();
        assert_eq!(served, found);
        assert!(FILES.iter().map(|file| file.bytes.len()).sum::<usize>() < BYTES_MAX);
    }

    #[test]
    fn the_page_names_no_other_host() {
        for file in FILES.iter().filter(|file| !file.name.starts_with("uPlot")) {
            let text = String::from_utf8(file.bytes.to_vec()).unwrap();
            // The name of a format is no address.
            let text = text.replace("http://www.w3.org/2000/svg", "");
            for link in ["http://", "https://", "//cdn", "src=\"//", "innerHTML", "eval("] {
                assert!(!text.contains(link), "{} has {link}", file.name);
            }
        }
    }
}
