//! Pagination of lists, as in Nova: `limit`, `marker`, and a link to the next page.

use axum::http::Uri;

use super::error::ApiError;
use super::responses::Link;

/// Maximum number of entries in a response, like Nova's `max_limit`.
const PAGE: usize = 1000;
/// Largest marker: the largest integer that every JSON reader represents exactly.
pub(super) const LAST_MARKER: u64 = (1 << 53) - 1;

/// The requested limit, but at most [`PAGE`].
pub(super) fn limit(asked: Option<u32>) -> Result<usize, ApiError> {
    match asked {
        Some(0) => Err(ApiError::bad_request("limit: found 0, wanted 1 or more.")),
        asked => Ok(asked
            .and_then(|asked| usize::try_from(asked).ok())
            .map_or(PAGE, |asked| asked.min(PAGE))),
    }
}

/// Id of the event before which a page begins; 0 without a marker.
pub(super) fn event(marker: Option<u64>) -> Result<i64, ApiError> {
    let marker = marker.unwrap_or(0);
    match i64::try_from(marker) {
        Ok(event) if marker <= LAST_MARKER => Ok(event),
        _ => Err(ApiError::bad_request(format!(
            "marker: found {marker}, wanted at most {LAST_MARKER}."
        ))),
    }
}

/// The page that begins after the marker, and the marker of the next one.
///
/// # Errors
/// 400 if no entry has the marker.
pub(super) fn page<T, M: PartialEq + ToString>(
    all: Vec<T>,
    limit: usize,
    marker: Option<&M>,
    marker_of: impl Fn(&T) -> M,
) -> Result<(Vec<T>, Option<M>), ApiError> {
    let from = match marker {
        None => 0,
        Some(marker) => {
            let at = all.iter().position(|one| marker_of(one) == *marker);
            let at = at.ok_or_else(|| {
                ApiError::bad_request(format!("Marker {} could not be found.", marker.to_string()))
            })?;
            at + 1
        }
    };
    let more = all.len() > from + limit;
    let page: Vec<T> = all.into_iter().skip(from).take(limit).collect();
    let next = page.last().filter(|_| more).map(marker_of);
    Ok((page, next))
}

/// Link to the page after the marker: the URI of this request, with another marker.
pub(super) fn next(uri: &Uri, marker: &str) -> Link {
    let kept = uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter(|pair| !pair.is_empty() && !is_marker(pair));
    let marker = serde_urlencoded::to_string([("marker", marker)]).unwrap_or_default();
    let query: Vec<&str> = kept.chain([marker.as_str()]).collect();
    // Without scheme and host, so that the link works behind a proxy.
    Link::next(format!("{}?{}", uri.path(), query.join("&")))
}

/// Whether a pair of a query is the marker, even if its key is percent-encoded (`m%61rker`).
fn is_marker(pair: &str) -> bool {
    let pairs: Vec<(String, String)> = serde_urlencoded::from_str(pair).unwrap_or_default();
    pairs.iter().any(|(key, _)| key == "marker")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_replaces_the_marker_and_keeps_the_rest() {
        let next = |query: &str| next(&format!("/v3/x?{query}").parse().unwrap(), "7 &").href;
        assert_eq!(
            next("limit=2&m%61rker=1&tag=a%3Ab&marker=5&&marker"),
            "/v3/x?limit=2&tag=a%3Ab&marker=7+%26"
        );
        assert_eq!(next(""), "/v3/x?marker=7+%26");
    }
}
