-- Drift tables as Scouter makes them. A real Scouter server brings its own migrations: leave this file out then.
create extension pg_cron;
create schema partman;
create extension pg_partman schema partman;
create schema scouter;

create table scouter.drift_entities (
    id serial primary key,
    uid text unique default gen_random_uuid(),
    space text not null,
    name text not null,
    version text not null,
    drift_type text,
    created_at timestamptz default now(),
    unique (space, name, version, drift_type)
);

create table scouter.custom_drift (
    created_at timestamptz default now() not null,
    entity_id integer not null,
    metric text not null,
    value double precision,
    updated_at timestamptz default now() not null,
    archived boolean default false,
    unique (created_at, entity_id, metric)
) partition by range (created_at);

create table scouter.psi_drift (
    created_at timestamptz default now() not null,
    entity_id integer not null,
    feature text not null,
    bin_id integer not null,
    bin_count integer not null,
    updated_at timestamptz default now() not null,
    archived boolean default false,
    unique (created_at, entity_id, feature, bin_id)
) partition by range (created_at);

create table scouter.spc_drift (
    created_at timestamptz default now() not null,
    entity_id integer not null,
    feature text,
    value double precision,
    updated_at timestamptz default now() not null,
    archived boolean default false,
    unique (created_at, entity_id, feature, value)
) partition by range (created_at);

-- pg_partman 4 takes the type of partitioning as third argument, 5 does not.
do $$
declare
    parent text;
    is_old boolean := (select extversion like '4.%' from pg_extension where extname = 'pg_partman');
begin
    foreach parent in array array['scouter.custom_drift', 'scouter.psi_drift', 'scouter.spc_drift'] loop
        if is_old then
            execute format('select partman.create_parent(%L, %L, %L, %L)', parent, 'created_at', 'native', '1 day');
        else
            execute format('select partman.create_parent(%L, %L, %L)', parent, 'created_at', '1 day');
        end if;
    end loop;
end
$$;

select cron.schedule('partition-maintenance', '0 * * * *', 'call partman.run_maintenance_proc()');
