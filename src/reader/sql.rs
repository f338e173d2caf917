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
use datafusion::sql::sqlparser::ast::{ObjectName, Query, Visit, Visitor};
use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::keywords::Keyword;
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer};

use crate::{Error, Result};

/// Bytes of a text.
const TEXT_BYTES_MAX: usize = 100_000;

/// Operators of a text, and its keywords: each may make an expression one level deeper. Names, values, commas and signs of
/// numbers are not counted: a list may be as long as the text.
const OPERATORS_MAX: usize = 200;
const KEYWORDS_MAX: usize = 500;

/// Tables of a plan, with those that stand behind names of common table expressions counted as often as they are named.
const TABLES_MAX: usize = 100;

/// Functions that make a text or a list of any length of a few bytes.
const MISSING: [&str; 6] = ["repeat", "lpad", "rpad", "array_repeat", "array_resize", "range"];

/// Takes from a session what a stranger's SQL must not have.
pub(super) fn restrict(session: &SessionContext) {
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
    let statement = state.sql_to_statement(text, &dialect).map_err(refused)?;
    check_tables(&statement)?;
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
    let mut before = &Token::Comma;
    let (mut operators, mut keywords) = (0, 0);
    for token in tokens.iter().filter(|token| !matches!(token, Token::Whitespace(_))) {
        match token {
            Token::Word(word) if word.quote_style.is_some() || word.keyword == Keyword::NoKeyword => {}
            Token::Word(_) => keywords += 1,
            Token::Minus if matches!(before, Token::Comma | Token::LParen) => {}
            Token::Comma | Token::Period | Token::LParen | Token::RParen => {}
            Token::Number(..) | Token::SingleQuotedString(_) | Token::SemiColon | Token::EOF => {}
            _ => operators += 1,
        }
        before = token;
    }
    for (what, count, max) in [("operators", operators, OPERATORS_MAX), ("keywords", keywords, KEYWORDS_MAX)]
    {
        if count > max {
            let detail = format!(
                "the query has {count} {what}; at most {max} are planned: a list (`in (1, 2, 3)`) may be longer"
            );
            return Err(Error::Query { detail });
        }
    }
    Ok(())
}

fn check_tables(statement: &Statement) -> Result<()> {
    let statement = match statement {
        Statement::Explain(explain) => explain.statement.as_ref(),
        other => other,
    };
    // Whatever else there is does not only read, and is refused by its plan.
    let Statement::Statement(statement) = statement else { return Ok(()) };
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
        check_tables(&datafusion::sql::parser::DFParser::parse_sql(text).unwrap()[0])
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
        assert!(tables(&format!("select (select count(*) from ({}) x)", many(TABLES_MAX + 1))).is_err());
    }

    #[test]
    fn lists_may_be_long_and_terms_may_not() {
        check_text(&format!("select 1 where 1 in ({})", vec!["-1.5"; 9_000].join(", "))).unwrap();
        check_text(&format!("select 1 where 'a' in ({})", vec!["'b'"; 15_000].join(", "))).unwrap();
        assert!(check_text(&format!("select {}", vec!["1"; OPERATORS_MAX + 2].join("+"))).is_err());
        assert!(check_text(&format!("select 1 where {}", vec!["true"; KEYWORDS_MAX].join(" or "))).is_err());
        assert!(check_text(&"x".repeat(TEXT_BYTES_MAX + 1)).is_err());
    }

    /// The deepest texts that are let through, on the stack of a task, in a build that is not optimised.
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn what_is_let_through_fits_on_the_stack() {
        let session = SessionContext::new();
        restrict(&session);
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
            vec!["select 1"; TABLES_MAX - 1].join(" union all "),
            vec!["select 1"; keywords(2)].join(" union "),
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
        assert!(answered >= 15, "{answered}");
    }

    #[tokio::test]
    async fn functions_without_bound_and_recursion_are_missing() {
        let session = SessionContext::new();
        restrict(&session);
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
