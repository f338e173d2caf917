//! Answers that are kept: who asks the same of the same versions gets the same, without a query.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use axum::body::Bytes;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse as _, Response};

use super::tag::Tag;

/// Bytes of all answers that are kept, and the most of one.
const BYTES_MAX: usize = 16 << 20;
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// The answers that were given last.
#[derive(Debug, Default)]
pub(super) struct Kept(Mutex<VecDeque<Answer>>);

#[derive(Debug)]
struct Answer {
    tag: Tag,
    content_type: HeaderValue,
    bytes: Bytes,
}

impl Kept {
    /// The answer with this tag, if it is kept.
    pub(super) fn answer(&self, tag: &Tag) -> Option<Response> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = kept.iter().position(|answer| answer.tag == *tag)?;
        let answer = kept.remove(place)?;
        let response =
            ([(header::CONTENT_TYPE, answer.content_type.clone())], answer.bytes.clone()).into_response();
        // It was asked for last.
        kept.push_back(answer);
        Some(tag.put_into(response))
    }

    /// Keeps an answer, and fewer of the older ones.
    pub(super) fn keep(&self, tag: &Tag, content_type: HeaderValue, bytes: Bytes) {
        if bytes.len() > ANSWER_BYTES_MAX {
            return;
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|answer| answer.tag != *tag);
        kept.push_back(Answer { tag: tag.clone(), content_type, bytes });
        while kept.iter().map(|answer| answer.bytes.len()).sum::<usize>() > BYTES_MAX {
            kept.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_kept_by_their_tags_and_the_oldest_go() {
        let kept = Kept::default();
        let tag = |number: usize| Tag::of(&[], &number.to_string());
        let keep = |number, length| {
            kept.keep(&tag(number), HeaderValue::from_static("text/plain"), Bytes::from(vec![b'x'; length]));
        };
        keep(0, ANSWER_BYTES_MAX + 1);
        assert!(kept.answer(&tag(0)).is_none());
        for number in 1..=16 {
            keep(number, ANSWER_BYTES_MAX);
        }
        // Asked for again, it is not the oldest any more.
        assert!(kept.answer(&tag(1)).is_some_and(|answer| answer.headers().contains_key(header::ETAG)));
        keep(17, 1);
        assert!(
            kept.answer(&tag(1)).is_some()
                && kept.answer(&tag(2)).is_none()
                && kept.answer(&tag(3)).is_some()
        );
    }
}
