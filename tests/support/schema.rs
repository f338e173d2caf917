//! The drift tables as Scouter makes them, in both shapes that are found in the field.

use tokio_postgres::Client;

/// The drift tables, in the archive's order.
pub const KINDS: [Source; 3] = [Source::Custom, Source::Psi, Source::Spc];

/// Which shape the drift tables have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Rows carry `name`, `space` and `version`.
    Named,
    /// Rows carry `entity_id`, a key of `scouter.drift_entities`.
    Entity,
}

/// How the drift tables are partitioned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Partitions {
    /// By pg_partman, a partition a day, as Scouter does.
    Partman,
    /// Only a default partition: quicker, for tests that don't care.
    DefaultOnly,
}

/// A drift table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Values of user-defined metrics.
    Custom,
    /// Counts per bin.
    Psi,
    /// Values of features.
    Spc,
}

impl Source {
    /// Name of the table in the schema `scouter`.
    pub fn table(self) -> &'static str {
        match self {
            Self::Custom => "custom_drift",
            Self::Psi => "psi_drift",
            Self::Spc => "spc_drift",
        }
    }

    /// Folder of the archived table.
    pub fn folder(self) -> &'static str {
        match self {
            Self::Custom => "custom",
            Self::Psi => "psi",
            Self::Spc => "spc",
        }
    }

    /// The columns after time and entity.
    pub fn value_columns(self) -> &'static [&'static str] {
        match self {
            Self::Custom => &["metric", "value"],
            Self::Psi => &["feature", "bin_id", "bin_count"],
            Self::Spc => &["feature", "value"],
        }
    }

    fn definition(self) -> &'static str {
        match self {
            Self::Custom => "metric text not null, value double precision",
            Self::Psi => "feature text not null, bin_id integer not null, bin_count integer not null",
            Self::Spc => "feature text, value double precision",
        }
    }

    /// What makes a row unique beside its time and entity. In Scouter custom_drift lacks the metric,
    /// which lets a model have only one metric at a time; the demo and the load want several.
    fn unique_columns(self) -> &'static str {
        match self {
            Self::Custom => "metric",
            Self::Psi => "feature, bin_id",
            Self::Spc => "feature, value",
        }
    }
}

impl Shape {
    /// The columns that name the entity of a row.
    pub fn entity_columns(self) -> &'static str {
        match self {
            Self::Named => "name, space, version",
            Self::Entity => "entity_id",
        }
    }

    fn entity_definition(self) -> &'static str {
        match self {
            Self::Named => "name text not null, space text not null, version text not null",
            Self::Entity => "entity_id integer not null",
        }
    }
}

const ENTITIES: &str = "
    create table scouter.drift_entities (
        id serial primary key,
        uid text unique default gen_random_uuid(),
        space text not null,
        name text not null,
        version text not null,
        drift_type text,
        created_at timestamptz default now(),
        unique (space, name, version, drift_type)
    );";

/// The SQL that makes one drift table, partitioned by `created_at`.
fn table_sql(source: Source, shape: Shape, partitions: Partitions) -> String {
    let (table, entity, entity_columns) = (source.table(), shape.entity_definition(), shape.entity_columns());
    let mut sql = format!(
        "create table scouter.{table} (
            created_at timestamptz default now() not null,
            {entity},
            {definition},
            updated_at timestamptz default now() not null,
            archived boolean default false,
            unique (created_at, {entity_columns}, {unique})
        ) partition by range (created_at);
        create index on scouter.{table} ({entity_columns}, created_at);",
        definition = source.definition(),
        unique = source.unique_columns(),
    );
    sql.push_str(&match partitions {
        // Scouter sets the retention to drop partitions, archived or not.
        Partitions::Partman => format!(
            "select partman.create_parent('scouter.{table}', 'created_at', 'native', '1 day');
             update partman.part_config
                set retention = '60 days', retention_keep_table = false, infinite_time_partitions = true
              where parent_table = 'scouter.{table}';"
        ),
        Partitions::DefaultOnly => {
            format!("create table scouter.{table}_default partition of scouter.{table} default;")
        }
    });
    sql
}

/// Makes the schema `scouter` with its drift tables.
pub async fn create(client: &Client, shape: Shape, partitions: Partitions) {
    let mut sql = String::from("create schema scouter;");
    if partitions == Partitions::Partman {
        sql.push_str("create schema partman; create extension pg_partman schema partman;");
    }
    if shape == Shape::Entity {
        sql.push_str(ENTITIES);
    }
    for source in KINDS {
        sql.push_str(&table_sql(source, shape, partitions));
    }
    client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("making the drift tables: {error:?}"));
}

/// The id of an entity, made if need be.
pub async fn entity_id(client: &Client, space: &str, name: &str, version: &str) -> i32 {
    let sql = "insert into scouter.drift_entities (space, name, version, drift_type) values ($1, $2, $3, 'test')
               on conflict (space, name, version, drift_type) do update set name = excluded.name returning id";
    client.query_one(sql, &[&space, &name, &version]).await.expect("entity").get(0)
}
