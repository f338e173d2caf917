//! SQL of somebody else: bounded before it is planned.
//!
//! DataFusion plans and folds constants without looking at the clock or at a memory pool, walks expressions by recursion, and
//! expands a common table expression wherever it is named. So a short text can ask for more stack, memory or time than there
//! is. Here a text is refused that is longer, deeper or wider than people write, and functions are missing that make a long
//! text or list of nothing. Texts that double in every one of nested queries still pass: whoever lets strangers ask runs
//! `highwater sql`, which is a process of its own with a limit to its memory and its time.

use std::collections::HashMap;
use std::ops::ControlFlow;

use datafusion::error::DataFusionError;
use datafusion::execution::context::SQLOptions;
use datafusion::logical_expr::LogicalPlan;
use datafusion::prelude::SessionContext;
use datafusion::sql::parser::Statement;
use datafusion::sql::sqlparser::ast::{
    self, Ident, ObjectName, Query, TableAlias, TableFactor, Visit, VisitMut, Visitor, VisitorMut,
};
use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::keywords::Keyword;
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer};

use super::drift;
use crate::{Error, Result};

/// Bytes of a text.
const TEXT_BYTES_MAX: usize = 100_000;

/// Operators of an expression, and its keywords: each may make it one level deeper. Names, values and signs of numbers are not
/// counted, and a comma begins anew: a list may be as long as the text.
const OPERATORS_MAX: usize = 200;
const KEYWORDS_MAX: usize = 500;

/// Words that begin or join queries (`select`, `from`, `union`): so deep is a plan, whatever commas there are.
const QUERIES_MAX: usize = 150;

/// Tables of a plan, with those that stand behind names of common table expressions counted as often as they are named.
const TABLES_MAX: usize = 100;

/// Functions that make a text or a list of any length of a few bytes.
const MISSING: [&str; 6] = ["repeat", "lpad", "rpad", "array_repeat", "array_resize", "range"];

/// Gives a session our functions, and takes from it what a stranger's SQL must not have.
pub(super) fn prepare(session: &SessionContext) {
    for function in drift::functions() {
        session.register_udf(function);
    }
    for name in MISSING {
        session.deregister_udf(name);
    }
    session.state_ref().write().config_mut().options_mut().execution.enable_recursive_ctes = false;
}

/// The plan of a query.
pub(super) async fn plan(session: &SessionContext, text: &str) -> Result<LogicalPlan> {
    check_text(text)?;
    let state = session.state();
    let dialect = state.config_options().sql_parser.dialect;
    let mut statement = state.sql_to_statement(text, &dialect).map_err(refused)?;
    // Whatever else there is does not only read, and is refused by its plan.
    if let Some(query) = explained(&mut statement) {
        check_tables(query)?;
        name_tables(query)?;
    }
    let plan = state.statement_to_plan(statement).await.map_err(|error| told(text, error))?;
    let only_read =
        SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
    only_read.verify_plan(&plan).map_err(refused)?;
    Ok(plan)
}

fn refused(error: DataFusionError) -> Error {
    Error::Query { detail: error.strip_backtrace() }
}

/// What is wrong with a query; a function that is missing on purpose is no typing error.
fn told(text: &str, error: DataFusionError) -> Error {
    let detail = error.strip_backtrace();
    let text = text.to_lowercase();
    match MISSING.iter().find(|name| detail.contains(&format!("'{name}'")) && text.contains(**name)) {
        Some(name) => Error::Query {
            detail: format!("the function {name} is not there: it makes texts or lists of any length"),
        },
        None => Error::Query { detail },
    }
}

fn check_text(text: &str) -> Result<()> {
    if text.len() > TEXT_BYTES_MAX {
        let detail = format!("the text has {} bytes; at most {TEXT_BYTES_MAX} are planned", text.len());
        return Err(Error::Query { detail });
    }
    // What is no SQL is the parser's to tell.
    let Ok(tokens) = Tokenizer::new(&GenericDialect {}, text).tokenize() else { return Ok(()) };
    let terms = Terms::of(tokens.iter().filter(|token| !matches!(token, Token::Whitespace(_))));
    for (what, count, max) in [
        ("operators in an expression", terms.deepest.operators, OPERATORS_MAX),
        ("keywords in an expression", terms.deepest.keywords, KEYWORDS_MAX),
        ("queries, each counted by its `select`, `from` and `union`", terms.queries, QUERIES_MAX),
    ] {
        if count > max {
            let detail = format!(
                "there are {count} {what}; at most {max} are planned: take it apart, or use a list (`in (1, 2, 3)`), which \
                 may be longer"
            );
            return Err(Error::Query { detail });
        }
    }
    Ok(())
}

/// Terms that may lie in each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Depth {
    operators: usize,
    keywords: usize,
}

impl Depth {
    fn max(self, other: Self) -> Self {
        Self { operators: self.operators.max(other.operators), keywords: self.keywords.max(other.keywords) }
    }
}

/// What a text may be planned to, at most: what stands behind a comma doesn't lie in what stands before it, and all that is in
/// parentheses may lie below whatever follows them.
#[derive(Debug, Default)]
struct Terms {
    deepest: Depth,
    queries: usize,
}

impl Terms {
    fn of<'a>(tokens: impl Iterator<Item = &'a Token>) -> Self {
        let mut terms = Self::default();
        // Before each open parenthesis, and the deepest of what is between commas behind it.
        let mut open: Vec<(Depth, Depth)> = Vec::new();
        let mut here = Depth::default();
        let mut before = &Token::Comma;
        for token in tokens {
            match token {
                Token::Comma => match open.last_mut() {
                    Some((outside, deepest)) => {
                        *deepest = deepest.max(here);
                        here = *outside;
                    }
                    None => here = Depth::default(),
                },
                Token::LParen => open.push((here, here)),
                Token::LBracket => {
                    here.operators += 1;
                    open.push((here, here));
                }
                Token::RParen | Token::RBracket => {
                    here = open.pop().map_or(here, |(_, deepest)| deepest.max(here));
                }
                // A literal of a type, as `date '2026-11-01'`, is a value.
                Token::SingleQuotedString(_) if is_type(before) => {
                    here.keywords = here.keywords.saturating_sub(1);
                }
                // A sign.
                Token::Minus if matches!(before, Token::Comma | Token::LParen) => {}
                Token::Word(word) if word.quote_style.is_some() || word.keyword == Keyword::NoKeyword => {}
                Token::Word(word) => {
                    here.keywords += 1;
                    terms.queries += usize::from(is_of_queries(word.keyword));
                }
                Token::Period | Token::Number(..) | Token::SingleQuotedString(_) => {}
                Token::SemiColon | Token::EOF => {}
                other => {
                    here.operators += 1;
                    terms.queries += usize::from(*other == Token::VerticalBarRightAngleBracket);
                }
            }
            terms.deepest = terms.deepest.max(here);
            before = token;
        }
        terms
    }
}

const fn is_of_queries(keyword: Keyword) -> bool {
    use Keyword::{EXCEPT, FROM, INTERSECT, SELECT, UNION, VALUES};
    matches!(keyword, SELECT | FROM | VALUES | UNION | EXCEPT | INTERSECT)
}

const fn is_type(token: &Token) -> bool {
    use Keyword::{DATE, INTERVAL, TIME, TIMESTAMP, TIMESTAMPTZ};
    matches!(token, Token::Word(word) if matches!(word.keyword, DATE | INTERVAL | TIME | TIMESTAMP | TIMESTAMPTZ))
}

/// The statement itself, however often it is to be explained: it is planned in any case.
fn explained(mut statement: &mut Statement) -> Option<&mut ast::Statement> {
    loop {
        match statement {
            Statement::Explain(explain) => statement = &mut explain.statement,
            Statement::Statement(query) => return Some(query),
            _ => return None,
        }
    }
}

fn check_tables(statement: &ast::Statement) -> Result<()> {
    let mut tables = Tables::default();
    let _ = statement.visit(&mut tables);
    if tables.here > TABLES_MAX {
        let detail = format!(
            "the query reads more than {TABLES_MAX} tables, once every `with` is put where it is named; take it apart"
        );
        return Err(Error::Query { detail });
    }
    Ok(())
}

/// Names the queries in `from` that have no name. DataFusion 55 takes their columns for those of the queries in them where the
/// names are the same: `select x from (select x + 1 as x from (select x + 1 as x from (select 1 as x)))` was 2. And refuses what
/// it would leave out without a word.
fn name_tables(statement: &mut ast::Statement) -> Result<()> {
    match VisitMut::visit(statement, &mut Names(0)) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => {
            let detail = "`tablesample` is not there: take a part by a condition".to_owned();
            Err(Error::Query { detail })
        }
    }
}

/// How many names were given.
struct Names(usize);

impl VisitorMut for Names {
    type Break = ();

    fn pre_visit_table_factor(&mut self, factor: &mut TableFactor) -> ControlFlow<()> {
        match factor {
            TableFactor::Table { sample: Some(_), .. } | TableFactor::Derived { sample: Some(_), .. } => {
                return ControlFlow::Break(());
            }
            TableFactor::Derived { alias: alias @ None, .. } => {
                self.0 += 1;
                let name = Ident::new(format!("unnamed_{}", self.0));
                *alias = Some(TableAlias { explicit: true, name, columns: Vec::new(), at: None });
            }
            _ => {}
        }
        ControlFlow::Continue(())
    }
}

/// Counts the tables of a plan.
#[derive(Default)]
struct Tables {
    /// Those of the query that is looked at.
    here: usize,
    /// Those of the queries around it.
    around: Vec<usize>,
    /// Those behind each name of a `with`. Where a name is used twice the larger one counts.
    named: HashMap<String, usize>,
    /// Where the queries of a `with` are, and their names.
    names: HashMap<*const Query, String>,
}

impl Visitor for Tables {
    type Break = ();

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        self.around.push(std::mem::take(&mut self.here));
        for one in query.with.iter().flat_map(|with| &with.cte_tables) {
            self.names.insert(std::ptr::from_ref(one.query.as_ref()), one.alias.name.value.to_lowercase());
        }
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        let of_query = std::mem::replace(&mut self.here, self.around.pop().unwrap_or_default());
        match self.names.remove(&std::ptr::from_ref(query)) {
            Some(name) => {
                let known = self.named.entry(name).or_default();
                *known = of_query.max(*known).max(1);
            }
            None => self.here = self.here.saturating_add(of_query),
        }
        // A name that nobody uses is planned, too.
        if of_query > TABLES_MAX {
            self.here = of_query;
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_relation(&mut self, relation: &ObjectName) -> ControlFlow<()> {
        let name = relation.to_string().to_lowercase();
        let count = self.named.get(name.trim_matches('"')).copied().unwrap_or(1);
        self.here = self.here.saturating_add(count);
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(text: &str) -> Result<()> {
        let mut statements = datafusion::sql::parser::DFParser::parse_sql(text).unwrap();
        check_tables(explained(&mut statements[0]).unwrap())
    }

    #[test]
    fn tables_are_counted_as_often_as_they_are_planned() {
        let chain = |length: usize| {
            let more = (1..length).map(|at| format!(", t{at} as (select a.x from t{0} a, t{0} b)", at - 1));
            format!("with t0 as (select 1 as x from psi){} select 1", more.collect::<String>())
        };
        tables(&chain(7)).unwrap();
        assert!(tables(&chain(8)).is_err(), "2^7 tables");
        assert!(tables(&chain(60)).is_err(), "more than a number holds");
        let many = |count: usize| format!("select 1 from {}", vec!["psi"; count].join(", "));
        tables(&many(TABLES_MAX)).unwrap();
        assert!(tables(&many(TABLES_MAX + 1)).is_err());
        assert!(tables(&format!("explain {}", many(TABLES_MAX + 1))).is_err());
        assert!(tables(&format!("explain explain {}", many(TABLES_MAX + 1))).is_err());
        assert!(tables(&format!("select (select count(*) from ({}) x)", many(TABLES_MAX + 1))).is_err());
    }

    #[test]
    fn lists_may_be_long_and_terms_may_not() {
        check_text(&format!("select 1 where 1 in ({})", vec!["-1.5"; 9_000].join(", "))).unwrap();
        check_text(&format!("select 1 where 'a' in ({})", vec!["'b'"; 15_000].join(", "))).unwrap();
        check_text(&format!(
            "select 1 where now() in ({})",
            vec!["timestamp '2026-11-01'"; 2_000].join(", ")
        ))
        .unwrap();
        check_text(&format!(
            "select {}",
            vec!["sum(case when a = 1 and b = 2 then c + 1 else 0 end)"; 500].join(", ")
        ))
        .unwrap();
        // Nothing that lies in the other is taken for a list.
        let nested = (0..30).fold("1".to_owned(), |inner, _| format!("({inner}){}", "+1".repeat(8)));
        assert!(check_text(&format!("select {nested}")).is_err(), "30 times 8");
        let nested = (0..30).fold("1".to_owned(), |inner, _| format!("f(2, {inner}, 3){}", "+1".repeat(8)));
        assert!(check_text(&format!("select {nested}")).is_err(), "30 times 8");
        let chain: String = (1..200).map(|at| format!(", t{at} as (select 1, 2 from t{})", at - 1)).collect();
        assert!(check_text(&format!("with t0 as (select 1){chain} select 1")).is_err());
        assert!(check_text(&vec!["select 1, 2"; QUERIES_MAX / 2 + 2].join(" union ")).is_err());
        assert!(check_text(&format!("select {}", vec!["1"; OPERATORS_MAX + 2].join("+"))).is_err());
        assert!(check_text(&format!("select 1 where {}", vec!["true"; KEYWORDS_MAX].join(" or "))).is_err());
        assert!(check_text(&"x".repeat(TEXT_BYTES_MAX + 1)).is_err());
    }

    /// The deepest texts that are let through, on the stack of a task, in a build that is not optimised.
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn what_is_let_through_fits_on_the_stack() {
        let session = SessionContext::new();
        prepare(&session);
        let operators = |most: usize| OPERATORS_MAX / most;
        let keywords = |most: usize| (KEYWORDS_MAX - 10) / most;
        let deep = [
            format!("select {}", vec!["1"; operators(1)].join("+")),
            format!("select {} from (select 'x' as x) a", vec!["a.x"; operators(1)].join("||")),
            format!("select {}", vec!["true"; operators(1)].join("=")),
            format!("select 1{}", "::bigint".repeat(operators(1))),
            format!("select a.x{} from (select 1 as x) a", "::text::bigint".repeat(operators(2))),
            format!("select a.x{} from (select [1] as x) a", "[1]".repeat(operators(2))),
            format!("select 1 from (select 1 as x) a where {}", vec!["x=1"; operators(1)].join(" or ")),
            format!(
                "select 1 from (select 'a' as x) a where {}",
                vec!["x like 'a'"; keywords(2)].join(" or ")
            ),
            format!("select 1 from (select 1 as x) a where {}", vec!["x is null"; keywords(3)].join(" and ")),
            format!("select true{}", " is true".repeat(keywords(3))),
            format!("select true{}", " in (true)".repeat(keywords(2))),
            format!("select now(){}", " at time zone 'UTC'".repeat(keywords(3))),
            format!("select {}1", "- ".repeat(40)),
            format!("select {}1{}", "(".repeat(40), ")".repeat(40)),
            format!("select {} true", "not ".repeat(40)),
            format!("select case {} end", "when true then 1 ".repeat(keywords(3))),
            vec!["select 1"; QUERIES_MAX / 2].join(" union all "),
            vec!["select 1"; QUERIES_MAX / 2].join(" union "),
            format!(
                "with t0 as (select 1 as x){} select x from t0",
                (1..QUERIES_MAX / 2 - 1)
                    .map(|at| format!(", t{at} as (select x + 1 as x from t{})", at - 1))
                    .collect::<String>()
            ),
            format!(
                "with t0 as (select 1 as x){0} select x from t{1}",
                (1..QUERIES_MAX / 2 - 1)
                    .map(|at| format!(", t{at} as (select x + 1 as x from t{})", at - 1))
                    .collect::<String>(),
                QUERIES_MAX / 2 - 2
            ),
            format!(
                "select count(*) from (select 1 as x) a {}",
                (0..KEYWORDS_MAX / 12)
                    .map(|at| format!(" join (select 1 as x) b{at} on b{at}.x = a.x"))
                    .collect::<String>()
            ),
            format!("{}select 1{}", "select * from (".repeat(40), ") x".repeat(40)),
            format!("select {}1{}", "abs(".repeat(40), ")".repeat(40)),
            format!("select {} 1 {}", "case when true then 1 else ".repeat(40), " end".repeat(40)),
        ];
        let mut answered = 0;
        for text in deep {
            let session = session.clone();
            // Some are refused, by the parser or for their types: not for want of a stack.
            let run = async move {
                let plan = plan(&session, &text).await?;
                let frame = session.execute_logical_plan(plan).await.map_err(refused)?;
                frame.collect().await.map_err(refused)
            };
            answered += usize::from(tokio::spawn(run).await.unwrap().is_ok());
        }
        assert!(answered >= 16, "{answered}");
    }

    #[tokio::test]
    async fn queries_without_a_name_have_their_own_columns() {
        let session = SessionContext::new();
        prepare(&session);
        for (text, wanted) in [
            ("select x from (select x + 1 as x from (select x + 1 as x from (select 1 as x)))", 3),
            (
                "select length(f) from (select f||f f from (select f||f f from (select f||f f from (select 'ab' f))))",
                16,
            ),
            ("select (select x from (select x + 1 as x from (select x + 1 as x from (select 1 as x))))", 3),
            (
                "with t as (select x from (select x + 1 x from (select x + 1 x from (select 1 x)))) select x from t",
                3,
            ),
            ("select position('c' in substring('abc' from 2)) + 1", 3),
        ] {
            let plan = plan(&session, text).await.unwrap();
            let rows = session.execute_logical_plan(plan).await.unwrap().collect().await.unwrap();
            let value = datafusion::common::ScalarValue::try_from_array(rows[0].column(0), 0).unwrap();
            assert_eq!(value.to_string(), wanted.to_string(), "{text}");
        }
        let refused = plan(&session, "select * from (select 1) tablesample (10 percent)").await.unwrap_err();
        assert!(refused.to_string().contains("tablesample"), "{refused}");
    }

    #[tokio::test]
    async fn functions_without_bound_and_recursion_are_missing() {
        let session = SessionContext::new();
        prepare(&session);
        for (text, said) in [
            ("select repeat('x', 2000000000)", "repeat"),
            ("select lpad('x', 2000000000)", "lpad"),
            ("select list_repeat(1, 2000000000)", "list_repeat"),
            ("select generate_series(1, 2000000000)", "generate_series"),
            ("with recursive t as (select 1 as x union all select x from t) select * from t", "ecursive"),
            ("create table t as select 1", "DDL"),
            ("set datafusion.execution.batch_size = 1", "not supported"),
        ] {
            let error = plan(&session, text).await.unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
        plan(&session, "select value from generate_series(1, 10)").await.unwrap();
    }
}
